"""What the runs of a sweep came to: one row for each."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pandas as pd

from wda.sweeps.grid import Sweep
from wda.sweeps.running import Done

SWEEP_FILE = "sweep.csv"

# Column of sweep.csv → what it holds; between `seed` and `accuracy` stand the varied fields.
COLUMNS: dict[str, str] = {
    "run": "name of the run",
    "method": "how it was trained",
    "seed": "of initialisation, order and dropout",
    "accuracy": "share of the held-out rows or tokens that are right after the last step, 0 to 1",
    "loss": "mean cross-entropy on them",
    "n_held_out": "held-out rows",
    "steps": "optimiser steps",
    "seconds": "wall time of the training with its scoring; of its last part, if it was resumed",
    "peak_memory": "bytes: the largest resident memory of the process while it trained, or of the "
    "accelerator's; empty where it is not known",
    "trainable": "trained parameters",
    "parameters": "all parameters, base and added",
    "trainable_share": "trained parameters over all, 0 to 1",
    "delta_m": "ΔM of the last checkpoint, mean over the compared matrices; empty where no weight "
    "changes",
    "delta_d": "ΔD of the last checkpoint, likewise",
    "pearson_r": "correlation of ΔM and ΔD over all checkpoints and compared matrices",
    "folder": "where the run lies",
    "error": "why it failed; empty where it did not",
}


def sweep_table(
    sweep: Sweep, done: Sequence[Done], table: pd.DataFrame, statistics: pd.DataFrame
) -> pd.DataFrame:
    """Put results, varied fields and what the comparison measured beside each other.

    Parameters
    ----------
    sweep : Sweep
        The runs, in the order of ``done``.
    done : sequence of Done
        What became of them.
    table, statistics : pandas.DataFrame
        Of the comparison of those that succeeded.

    Returns
    -------
    pandas.DataFrame
        One row per run; columns as in :data:`COLUMNS`, and the varied fields.
    """
    varied = {name: values for name, values in sweep.varied.items() if name not in COLUMNS}
    moved = _last_means(table)
    pooled = statistics[statistics["matrix"] == "all"].set_index("run")["pearson_r"]
    rows = []
    for i, one in enumerate(done):
        recipe, result = one.planned.recipe, one.result
        rows.append(
            {
                "run": one.planned.name,
                "method": recipe.method,
                "seed": recipe.seed,
                **{name: _cell(values[i]) for name, values in varied.items()},
                **(result.model_dump(exclude={"accuracy_of"}) if result else {}),
                "trainable_share": result.trainable / result.parameters if result else math.nan,
                **moved.get(one.planned.name, {}),
                "pearson_r": pooled.get(one.planned.name, math.nan),
                "folder": str(one.folder),
                "error": one.error,
            }
        )
    wanted = [*list(COLUMNS)[:3], *varied, *list(COLUMNS)[3:]]
    return pd.DataFrame(rows).reindex(columns=wanted)


def _last_means(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    if table.empty:
        return {}
    last = table[table["step"] == table.groupby("run")["step"].transform("max")]
    means = last.groupby("run")[["delta_m", "delta_d"]].mean()
    return {
        str(run): {str(name): float(value) for name, value in row.items()}
        for run, row in means.to_dict("index").items()
    }


def _cell(value: object) -> object:
    """Write lists and mappings as text."""
    if isinstance(value, list | dict):
        return "+".join(map(str, value)) if isinstance(value, list) else json.dumps(value)
    return value
