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
        ``accuracy_by_FIELD`` for every field, and ``profile``.
    """
    rows = table[table["accuracy"].notna()]
    fields = [field for field in varied if field != "seed" and field in rows]
    fields = [field for field in fields if rows[field].nunique() > 1]
    if rows["method"].nunique() > 1:
        yield "accuracy_by_method", _of(repetitions(rows, "method"))
    for field in fields:
        others = [f for f in fields if f != field and not _follows(rows, f, field)]
        by_line = rows[rows[field].notna()].groupby(["method", *others], dropna=False)
        if by_line.ngroups <= _MOST_LINES and (by_line[field].nunique() > 1).any():
            ax = repetitions(rows, field, series=["method", *others])
            yield f"accuracy_by_{field}", _of(ax)
    if not compared.empty and compared["layer"].notna().any():
        lines = compared.drop_duplicates("run")
        if lines.groupby(["method", "rank"], dropna=False).ngroups <= _MOST_LINES:
            yield "profile", profile_grid(compared)


def _of(ax: Axes) -> Figure:
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure


def _follows(rows: pd.DataFrame, field: str, other: str) -> bool:
    """Tell whether one field has one value wherever method and the other field are the same."""
    return bool((rows.groupby(["method", other], dropna=False)[field].nunique() <= 1).all())
