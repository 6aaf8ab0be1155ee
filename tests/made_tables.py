"""Tables as a comparison writes them, made up, and what figures of them have to keep."""

from __future__ import annotations

from itertools import combinations
from unittest.mock import patch

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.text import Text

from wda.draws import Draws
from wda.figures import Material
from wda.spectra import COLUMNS as SPECTRA_COLUMNS
from wda.statistics import compute_statistics
from wda.table import make_table

# How large ΔD and ΔM are of each method, roughly as in the demo.
_SIZES = {"ft": (4e-5, 7e-4), "lora": (1e-2, 1.5e-2), "dora": (9e-3, 2e-2)}

_INTS = {"seed": "Int64", "step": "Int64", "layer": "Int64"}


def made_table(
    layers: int = 6,
    steps: int = 4,
    runs: tuple[str, ...] = ("ft", "lora", "dora"),
    matrices: tuple[str, ...] = ("query", "value"),
    methods: tuple[str, ...] | None = None,
    seeds: tuple[int | None, ...] | None = None,
    floor: float = 1e-6,
) -> pd.DataFrame:
    """Make a table; a floor of 0.15 puts the first steps of some layers below three times it."""
    rng = np.random.default_rng(3)
    rows = []
    for i, run in enumerate(runs):
        method = (methods or runs)[i]
        size_d, size_m = _SIZES.get(method, (1e-2, 1e-2))
        far = 0.4 + rng.random((len(matrices), layers))
        tall = {"lora": far, "dora": 1.6 - 0.5 * far}.get(method, 0.6 + 0.5 * rng.random(far.shape))
        for step in range(steps):
            grown = ((step + 1) / steps) ** 0.4
            for j, matrix in enumerate(matrices):
                for layer in range(layers):
                    delta_d = size_d * far[j, layer] * grown**2 * (1 + 0.02 * rng.random())
                    delta_m = size_m * tall[j, layer] * grown * (1 + 0.02 * rng.random())
                    floors = size_d * floor / 3, size_m * floor
                    rows.append(
                        {
                            "run": run,
                            "method": method,
                            "seed": (seeds or (0,) * len(runs))[i],
                            "step": 175 * (step + 1),
                            "module": f"encoder.layer.{layer}.{matrix}",
                            "layer": layer,
                            "matrix": matrix,
                            "granularity": "vector",
                            "per": "output",
                            "out_features": 3,
                            "in_features": 4,
                            "n_vectors": 3,
                            "delta_m": delta_m,
                            "delta_d": delta_d,
                            "floor_delta_d": floors[0],
                            "floor_delta_m": floors[1],
                            "below_floor": delta_d < 3 * floors[0] or delta_m < 3 * floors[1],
                            "n_undirected": 0,
                            "dtype": "float32",
                            "base_dtype": "float32",
                        }
                    )
    return make_table(rows)


def made_statistics(table: pd.DataFrame) -> pd.DataFrame:
    """Give the fits, with intervals and nulls put beside them."""
    statistics = compute_statistics(table)
    r, slope = statistics["pearson_r"], statistics["slope"]
    return statistics.assign(
        pearson_r_low=(r - 0.3).clip(-1, 1),
        pearson_r_high=(r + 0.1).clip(-1, 1),
        slope_low=slope - 0.3 * slope.abs(),
        slope_high=slope + 0.4 * slope.abs(),
        null="isotropic",
        null_r_low=0.83,
        null_r_high=0.95,
        null_p=0.0042,
    )


def made_draws(table: pd.DataFrame, draws: int = 300) -> Draws:
    """Make draws whose ΔM grows with ΔD."""
    rng = np.random.default_rng(8)
    shape = len(table), draws
    delta_d = table["delta_d"].to_numpy(float)[:, None] * np.exp(0.1 * rng.standard_normal(shape))
    noise = np.exp(0.12 * rng.standard_normal(shape))
    delta_m = 0.3 * table["delta_m"].max() * np.sqrt(delta_d / delta_d.max()) * noise
    null = np.where(table["method"] == "ft", "isotropic", "rank 8")
    return Draws(null, delta_m, delta_d)


def made_vectors(table: pd.DataFrame, count: int = 48) -> pd.DataFrame:
    """Make changes vector by vector."""
    rng = np.random.default_rng(5)
    keys = ["run", "seed", "step", "module", "layer", "matrix", "head", "per"]
    frame = table.loc[table.index.repeat(count), [*keys, "delta_m", "delta_d"]]
    change = frame["delta_m"] * (rng.standard_normal(len(frame)) + 0.4)
    turn = frame["delta_d"] * rng.gamma(3, 1 / 3, len(frame))
    return (
        frame[keys]
        .assign(
            vector=np.tile(np.arange(count), len(table)),
            magnitude_before=1.0,
            magnitude_change=change,
            direction_change=turn,
        )
        .reset_index(drop=True)
    )


def made_spectra(table: pd.DataFrame, size: int = 64) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make singular values of W0, Wt and an update of rank 8, and their effective rank."""
    rng = np.random.default_rng(6)
    number = np.arange(size)
    keys = ["run", "seed", "step", "module", "layer", "matrix"]
    values, summary = [], []
    for row in table[[*keys, "method", "delta_d"]].to_dict("records"):
        method, delta_d = row.pop("method"), row.pop("delta_d")
        w0 = 8 * (number + 1) ** -0.5 * np.exp(-number / 60) * (1 + 0.1 * rng.random())
        update = delta_d**0.5 * np.exp(-number / (3 + 4 * rng.random()))
        update = update if method == "ft" else update[:8]
        for of, found in {"w0": w0, "wt": w0 * 1.02, "update": update}.items():
            frame = pd.DataFrame({"index": np.arange(len(found)), "singular_value": found})
            values.append(frame.assign(**row, of=of))
        share = update / update.sum()
        rank = float(np.exp(-(share * np.log(share)).sum()))
        summary.append({**row, "method": method, "effective_rank": rank})
    # Whatever else a summary tells is in no figure.
    told = pd.DataFrame(summary).reindex(columns=list(SPECTRA_COLUMNS), fill_value=0)
    return pd.concat(values, ignore_index=True).astype(_INTS), told.astype(_INTS)


def made_material(table: pd.DataFrame) -> Material:
    """Put a table together with all that figures are made of; the last step has the rest."""
    last = table[table["step"].fillna(-1) == table["step"].fillna(-1).max()]
    return Material(
        table, made_statistics(table), made_draws(table), made_vectors(last), *made_spectra(last)
    )


def untidy(figure: Figure) -> list[str]:
    """Tell which words of a figure are cut off or lie on each other, and legends on panels."""
    edge = figure.bbox.padded(1.5)
    shown = [(text, text.get_window_extent()) for text in _drawn_words(figure)]
    wrong = [
        f"cut off: {text.get_text()!r}"
        for text, box in shown
        if box.x0 < edge.x0 or box.y0 < edge.y0 or box.x1 > edge.x1 or box.y1 > edge.y1
    ]
    wrong += [
        f"on each other: {one.get_text()!r}, {other.get_text()!r}"
        for (one, box), (other, second) in combinations(shown, 2)
        if box.padded(-1.5).overlaps(second.padded(-1.5)) and not _name_points(one, other)
    ]
    for legend in [*figure.legends, *filter(None, (ax.get_legend() for ax in figure.axes))]:
        box = legend.get_window_extent().padded(-1)
        if any(box.overlaps(ax.get_window_extent()) for ax in figure.axes):
            wrong.append("a legend lies on a panel")
    return wrong


def _drawn_words(figure: Figure) -> list[Text]:
    """Give the texts that are drawn: of its ticks an axis draws only those inside its limits."""
    drawn: list[Text] = []
    draw = Text.draw

    def noted(text: Text, renderer: object) -> None:
        drawn.append(text)
        draw(text, renderer)

    with patch.object(Text, "draw", noted):
        figure.draw_without_rendering()
    return [text for text in drawn if text.get_visible() and text.get_text().strip()]


def _name_points(one: Text, other: Text) -> bool:
    """Tell whether both are layers at the ends of paths, which may end in one place."""
    return one.get_text().isdigit() and other.get_text().isdigit() and one.get_fontsize() == 6
