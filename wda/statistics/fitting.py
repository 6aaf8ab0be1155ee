"""Table → how ΔM goes with ΔD: per run, method and matrix, with intervals, in numbers and words."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pandas as pd
from scipy import stats

from wda.draws import Draws
from wda.errors import TableError
from wda.statistics.clouds import Cloud, Selection, has_both, make_cloud, select
from wda.statistics.columns import ALL, COLUMNS
from wda.statistics.intervals import Interval, interval
from wda.statistics.lines import fit_line
from wda.statistics.mixed_model import mixed_slope
from wda.statistics.moments import (
    Estimate,
    between_layers,
    given_step,
    pooled,
    ranked,
    within_layers,
    within_steps,
)
from wda.statistics.nulls import null_band
from wda.statistics.readings import read
from wda.statistics.theil_sen import theil_sen
from wda.table import check_table

_WORDS = ("run", "method", "matrix", "per", "granularity", "null", "reading")
_COUNTS = ("runs", "n", "n_below_floor", "clusters")


def compute_statistics(
    table: pd.DataFrame, draws: Draws | None = None, *, leave_out_floored: bool = False
) -> pd.DataFrame:
    """Fit every run's points, for each matrix label and for all of them together.

    The runs of a method that has several are fitted together as well. Vectors of another axis or
    granularity are fitted by themselves. What each number means and when not to trust it is told
    in ``docs/statistics.md``.

    Parameters
    ----------
    table : pandas.DataFrame
        A table with the columns of :data:`wda.table.COLUMNS`.
    draws : Draws, optional
        What random updates show, row by row as the table: what r and slope are set beside.
    leave_out_floored : bool
        Whether to leave out points under three times what rounding alone would give.

    Returns
    -------
    pandas.DataFrame
        Columns as in :data:`COLUMNS`; one row per run and label, then one with label ``all``; the
        same for every method with several runs. The same table gives the same numbers.

    Raises
    ------
    TableError
        When columns are missing, there is no row, or the draws are of another table.
    """
    table = check_table(table)
    if draws is not None and len(draws.delta_d) != len(table):
        raise TableError(
            f"draws: of {len(draws.delta_d)} rows, but the table has {len(table)}; give those that "
            "were drawn for this table"
        )
    rows: list[dict[str, object]] = []
    before: Selection | None = None
    for selection in select(table):
        # Of one label alone, all of them are the same points.
        if before and np.array_equal(before.positions, selection.positions):
            rows.append(rows[-1] | {"matrix": ALL})
        else:
            rows.append(_row(table, draws, selection, leave_out_floored))
        before = selection
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    words = dict.fromkeys(_WORDS, "string")
    return frame.astype(words | dict.fromkeys(_COUNTS, "int64"))


def _row(
    table: pd.DataFrame, draws: Draws | None, selection: Selection, leave_out_floored: bool
) -> dict[str, object]:
    """Fit one selection."""
    positions = selection.positions
    floored = table["below_floor"].fillna(False).to_numpy(bool)[positions]
    if leave_out_floored:
        positions = positions[~floored]
    positions = positions[has_both(table.iloc[positions])]
    cloud = make_cloud(table.iloc[positions])
    row: dict[str, object] = asdict(selection)
    del row["positions"]
    row |= {"n": len(cloud), "n_below_floor": int(floored.sum()), "clusters": cloud.layers}
    found = estimates(cloud)
    row |= found
    if draws is not None and found:
        row |= null_band(draws.of(positions), cloud, found)
    return row | {"reading": read(row, cloud, leave_out_floored)}


def estimates(cloud: Cloud) -> dict[str, float]:
    """Estimate everything there is of a cloud, with intervals; NaN where it is not determined."""
    if cloud.why_no_line():
        return {}
    values: dict[str, float] = {}

    def note(name: str, value: float, ends: Interval) -> None:
        values.update({name: value, f"{name}_low": ends.low, f"{name}_high": ends.high})

    line = fit_line(cloud.x, cloud.y)
    r, slope = pooled(cloud)
    note("pearson_r", line.pearson_r, interval(r))
    note("slope", line.slope, interval(slope))
    values["intercept"] = line.intercept
    note("theil_sen_slope", *theil_sen(cloud))
    note("mixed_slope", *mixed_slope(cloud))
    others: dict[str, Estimate | None] = {
        "spearman_r": ranked(cloud, stats.rankdata(cloud.x), stats.rankdata(cloud.y)),
        "within_layer_r": within_layers(cloud),
        "between_layer_r": between_layers(cloud),
        "within_step_r": within_steps(cloud),
        "partial_r": given_step(cloud),
    }
    for name, estimate in others.items():
        if estimate is not None:
            note(name, estimate.value(), interval(estimate))
    return values
