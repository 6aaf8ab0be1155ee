"""The figures of a sweep: accuracy against each thing varied, ΔM and ΔD layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wda.figures import profile_grid, repetitions

# Of more lines than this a figure tells nothing.
_MOST_LINES = 10


def sweep_figures(
    table: pd.DataFrame, varied: Sequence[str], compared: pd.DataFrame
) -> Iterator[tuple[str, Figure]]:
    """Draw what a sweep came to.

    Parameters
    ----------
    table : pandas.DataFrame
        Its table.
    varied : sequence of str
        The fields that differ among its runs.
    compared : pandas.DataFrame
        The comparison's table.

    Yields
    ------
    str, matplotlib.figure.Figure
        ``accuracy_by_FIELD`` for every field; and, of each method at its best setting,
        ``accuracy_by_method``, and ``profile``: ΔM and ΔD layer by layer.
    """
    rows = table[table["accuracy"].notna()]
    fields = [field for field in varied if field != "seed" and field in rows]
    fields = [field for field in fields if rows[field].nunique() > 1]
    best = best_settings(rows, fields)
    if best["method"].nunique() > 1:
        yield "accuracy_by_method", _of(repetitions(best, "method"))
    for field in fields:
        others = [f for f in fields if f != field and not _follows(rows, f, field)]
        by_line = rows[rows[field].notna()].groupby(["method", *others], dropna=False)
        if by_line.ngroups <= _MOST_LINES and (by_line[field].nunique() > 1).any():
            ax = repetitions(rows, field, series=["method", *others])
            yield f"accuracy_by_{field}", _of(ax)
    of_best = compared[compared["run"].isin(best["run"])] if not compared.empty else compared
    if not of_best.empty and of_best["layer"].notna().any():
        yield "profile", profile_grid(of_best)


def best_settings(rows: pd.DataFrame, fields: Sequence[str]) -> pd.DataFrame:
    """Choose of each method the runs of the setting whose mean accuracy over the seeds is highest.

    Parameters
    ----------
    rows : pandas.DataFrame
        A sweep's table.
    fields : sequence of str
        The fields that make a setting.

    Returns
    -------
    pandas.DataFrame
        Some of the rows, in their order.
    """
    means = rows.groupby(["method", *fields], dropna=False)["accuracy"].transform("mean")
    highest = means.groupby(rows["method"]).transform("max")
    return rows[means == highest]


def _of(ax: Axes) -> Figure:
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure


def _follows(rows: pd.DataFrame, field: str, other: str) -> bool:
    """Tell whether one field has one value wherever method and the other field are the same."""
    return bool((rows.groupby(["method", other], dropna=False)[field].nunique() <= 1).all())
