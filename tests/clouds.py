"""Made clouds of points whose layers are drawn from a known population."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from wda.statistics.clouds import Cloud
from wda.table import make_table


@dataclass(frozen=True)
class Population:
    """ΔD and ΔM grow with the step; layers differ, and so do the checkpoints of a layer and runs.

    `between` and `within` are correlations of what is normal underneath.
    """

    between: float = -0.5
    within: float = 0.4
    growth: float = 0.6
    of_layers: float = 0.6
    of_runs: float = 0.2
    of_points: float = 0.3
    steps: int = 4

    def draw(self, layers: int, random: np.random.Generator, runs: int = 1) -> Cloud:
        shape = (runs, layers, self.steps)
        run, layer, step = (a.ravel() for a in np.indices(shape))
        lasting = _pairs(self.between, (1, layers, 1), random) * self.of_layers
        training = _pairs(self.between, (runs, 1, 1), random) * self.of_runs
        passing = _pairs(self.within, shape, random) * self.of_points
        grown = self.growth * np.log1p(np.arange(self.steps))
        x, y = (np.exp(values + grown).ravel() for values in lasting + training + passing)
        at_once = run * self.steps + step
        return Cloud(x, y, run, layer, run * layers + layer, at_once, run, 100.0 * (step + 1))


def _pairs(r: float, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Draw pairs of normal numbers that correlate."""
    first, second = random.standard_normal((2, *shape))
    return np.stack([first, r * first + np.sqrt(1 - r * r) * second])


def table_of_clouds(clouds: dict[tuple[str, str, str], Cloud], **more: object) -> pd.DataFrame:
    """Give the table of clouds of one run each, keyed by run, method and matrix."""
    rows = [
        {
            "run": run,
            "method": method,
            "seed": 0,
            "step": int(cloud.step[i]),
            "module": f"model.layers.{cloud.layer[i]}.{matrix}",
            "layer": int(cloud.layer[i]),
            "matrix": matrix,
            "per": "output",
            "granularity": "vector",
            "out_features": 3,
            "in_features": 4,
            "n_vectors": 3,
            "delta_d": cloud.x[i],
            "delta_m": cloud.y[i],
            "n_undirected": 0,
            "dtype": "float32",
            "base_dtype": "float32",
        }
        | more
        for (run, method, matrix), cloud in clouds.items()
        for i in range(len(cloud))
    ]
    return make_table(rows)
