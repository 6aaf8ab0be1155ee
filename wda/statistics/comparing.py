"""Table → how r and slope of two runs, or of two methods, differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd

from wda.statistics.clouds import has_both, layer_names, make_cloud, unit_names
from wda.statistics.columns import ALL, COMPARISON_COLUMNS
from wda.statistics.intervals import difference
from wda.statistics.moments import pooled
from wda.statistics.resampling import FEWEST_LAYERS, Sampled, sample
from wda.table import check_table

_COUNTS = ("n_a", "n_b", "clusters")
_WORDS = (
    *("run_a", "run_b", "method_a", "method_b", "matrix", "per", "granularity", "matched", "note"),
)


class _Side(NamedTuple):
    """One of the two that are compared; `run` is None where several stand together."""

    run: str | None
    method: str
    rows: pd.DataFrame


def compare_methods(table: pd.DataFrame, *, leave_out_floored: bool = False) -> pd.DataFrame:
    """Compare r and slope of every two runs, and of every two methods of which one has several.

    Only matrices that both have count, at all their checkpoints, at the steps that both have, and,
    for each matrix, at the checkpoints whose ‖ΔW‖ lies in the range that both reach. Both are
    resampled in the same layers, so what a layer does to both cancels out of the difference.

    Parameters
    ----------
    table : pandas.DataFrame
        A table with the columns of :data:`wda.table.COLUMNS`.
    leave_out_floored : bool
        Whether to leave out points under three times what rounding alone would give.

    Returns
    -------
    pandas.DataFrame
        Columns as in :data:`COMPARISON_COLUMNS`; no rows when there is one run.

    Raises
    ------
    TableError
        When columns are missing or there is no row.
    """
    table = check_table(table).reset_index(drop=True)
    table = table.assign(layer_name=layer_names(table), unit=unit_names(table))
    if leave_out_floored:
        table = table[~table["below_floor"].fillna(False).to_numpy(bool)]
    table = table[has_both(table)]
    rows: list[dict[str, object]] = []
    known: _Known = {}
    for (per, granularity), alike in table.groupby(
        ["per", "granularity"], sort=False, dropna=False
    ):
        for a, b in _pairs(alike):
            kind = {
                "run_a": a.run,
                "run_b": b.run,
                "method_a": a.method,
                "method_b": b.method,
                "per": per,
                "granularity": granularity,
            }
            rows += [kind | found for found in _compare(a.rows, b.rows, known)]
    frame = pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS))
    numbers = dict.fromkeys(COMPARISON_COLUMNS, "float64") | dict.fromkeys(_COUNTS, "int64")
    return frame.astype(numbers | dict.fromkeys(_WORDS, "string"))


def _pairs(table: pd.DataFrame) -> Iterator[tuple[_Side, _Side]]:
    """Give every two runs, then every two methods where one or both have several runs."""
    runs = [
        _Side(str(run), str(rows["method"].iloc[0]), rows)
        for run, rows in table.groupby("run", sort=False)
    ]
    yield from combinations(runs, 2)
    methods = [
        _Side(None, str(method), rows) for method, rows in table.groupby("method", sort=False)
    ]
    for a, b in combinations(methods, 2):
        if max(a.rows["run"].nunique(), b.rows["run"].nunique()) > 1:
            yield a, b


def _compare(a: pd.DataFrame, b: pd.DataFrame, known: _Known) -> Iterator[dict[str, object]]:
    """Compare two sides for every label that both have and for all of them, matched each way."""
    units = set(a["unit"].unique()) & set(b["unit"].unique())
    a, b = (rows[rows["unit"].isin(units)] for rows in (a, b))
    labels = [label for label in dict.fromkeys(a["matrix"]) if (b["matrix"] == label).any()]
    for label in [*labels, ALL]:
        of_label = [rows if label == ALL else rows[rows["matrix"] == label] for rows in (a, b)]
        for name, match in _MATCHES.items():
            yield {"matrix": label, "matched": name} | _differences(*match(*of_label), known)


class _Matched(NamedTuple):
    """The rows of both that are compared, or why there are none."""

    a: pd.DataFrame
    b: pd.DataFrame
    why_none: str


def _at_all_points(a: pd.DataFrame, b: pd.DataFrame) -> _Matched:
    return _Matched(a, b, "no matrix in common")


def _at_the_same_steps(a: pd.DataFrame, b: pd.DataFrame) -> _Matched:
    runs = [
        set(rows["step"].dropna().unique()) for side in (a, b) for _, rows in side.groupby("run")
    ]
    steps = set.intersection(*runs) if runs else set()
    known = any(runs)
    why = "no step in common" if known else "the steps are not known"
    return _Matched(a[a["step"].isin(steps)], b[b["step"].isin(steps)], why)


def _at_the_same_norms(a: pd.DataFrame, b: pd.DataFrame) -> _Matched:
    """Keep of every matrix the checkpoints whose ‖ΔW‖ lies in the range that all runs reach."""
    both = pd.concat([a, b])
    if both["update_norm"].isna().all():
        return _Matched(a[:0], b[:0], "‖ΔW‖ is not in the table")
    of_run = both["update_norm"].groupby([both["unit"], both["run"]])
    low, high = of_run.min().groupby(level=0).max(), of_run.max().groupby(level=0).min()

    def within(rows: pd.DataFrame) -> pd.DataFrame:
        lowest, highest = rows["unit"].map(low), rows["unit"].map(high)
        return rows[rows["update_norm"].between(lowest, highest)]

    return _Matched(within(a), within(b), "no matrix has the same ‖ΔW‖ in both")


_MATCHES: dict[str, Callable[[pd.DataFrame, pd.DataFrame], _Matched]] = {
    "all": _at_all_points,
    "step": _at_the_same_steps,
    "update norm": _at_the_same_norms,
}


def _differences(
    a: pd.DataFrame, b: pd.DataFrame, why_none: str, known: _Known
) -> dict[str, object]:
    """Subtract r and slope of b from those of a, in the layers that both have."""
    layers = set(a["layer_name"].unique()) & set(b["layer_name"].unique())
    a, b = (rows[rows["layer_name"].isin(layers)] for rows in (a, b))
    row: dict[str, object] = {"n_a": len(a), "n_b": len(b), "clusters": len(layers)}
    if not layers:
        return row | {"note": why_none}
    measured = [_measure(rows, known) for rows in (a, b)]
    for side, found in zip("ab", measured, strict=True):
        if found.why_none:
            return row | {"note": f"{side}: {found.why_none}"}
    notes = []
    if len(layers) < FEWEST_LAYERS:
        notes.append(
            f"{len(layers)} layers in common, fewer than the {FEWEST_LAYERS} that an interval takes"
        )
    both = zip(*(found.estimates for found in measured), strict=True)
    # Two r are no further apart than 2, and a resample of few layers does not know that.
    for name, most, (one, other) in zip(("r", "slope"), (2, np.inf), both, strict=True):
        value, ends = difference(one, other)
        low, high = np.clip(ends, -most, most)
        row |= {
            f"{name}_difference": value,
            f"{name}_difference_low": float(low),
            f"{name}_difference_high": float(high),
        }
        if np.isnan(value):
            notes.append("ΔM of one is the same at all points")
    return row | {"note": "; ".join(notes)}


class _Measured(NamedTuple):
    """R and slope of some rows, or why there are none."""

    estimates: tuple[Sampled, ...]
    why_none: str | None


# What was measured of rows, by their positions: a run takes part in several comparisons.
_Known = dict[bytes, _Measured]


def _measure(rows: pd.DataFrame, known: _Known) -> _Measured:
    key = rows.index.to_numpy().tobytes()
    if key not in known:
        cloud = make_cloud(rows)
        why = cloud.why_no_line()
        # Differences of r are taken as such, not of Fisher's z.
        r_and_slope = [] if why else [replace(one, is_correlation=False) for one in pooled(cloud)]
        known[key] = _Measured(tuple(map(sample, r_and_slope)), why)
    return known[key]
