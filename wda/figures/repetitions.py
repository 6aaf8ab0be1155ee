"""What the runs of a sweep came to against what was varied: the paper's Figures 4 and 5."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from pandas.api.types import is_numeric_dtype

from wda import style
from wda.figures.encoding import dot, legend_beside, wrapped
from wda.figures.panels import is_wide, new_axes, with_values
from wda.statistics import mean_of_repetitions

_LABELS = {
    "accuracy": "held-out accuracy",
    "rank": "rank r",
    "samples": "rows trained on",
    "learning_rate": "learning rate",
    "trainable_share": "share of parameters trained",
    "seconds": "seconds",
}


def repetitions(
    table: pd.DataFrame,
    x: str,
    y: str = "accuracy",
    ax: Axes | None = None,
    *,
    series: Sequence[str] = ("method",),
) -> Axes:
    """Draw a result of a sweep against what was varied: the mean over seeds and its interval.

    Every run is a small dot, every mean a large one with its 95 % interval (Student's t over the
    seeds). Numbers are joined by lines, on a logarithmic scale where they span much; words stand
    side by side.

    Parameters
    ----------
    table : pandas.DataFrame
        A sweep's table, or any selection of its rows.
    x : str
        A varied column: ``rank``, ``samples``, ``targets``, …
    y : str
        What came of it: ``accuracy``, ``loss``, ``delta_d``, …
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure.
    series : sequence of str
        Columns that tell the lines apart.

    Returns
    -------
    matplotlib.axes.Axes
        With a legend where there are several lines.

    Raises
    ------
    TableError
        When a column is missing, or there is nothing to draw.
    """
    rows = with_values(table, [y], "repetitions")
    rows = with_values(rows, [x], "repetitions") if is_numeric_dtype(table[x]) else rows
    rows = rows[rows[[x, y]].notna().all(axis=1)]
    groups = list(rows.groupby(list(series), sort=False, dropna=False))
    with style.paper_style():
        ax = new_axes(ax)
        places = _places(rows[x])
        for number, (_, of_series) in enumerate(groups):
            # Side by side, so that intervals of lines do not hide each other.
            shift = 0.16 * (number - (len(groups) - 1) / 2) if isinstance(places, dict) else 0.0
            _draw_series(ax, of_series, (x, y), places, shift, number)
        _set_scale(ax, rows[x], places)
        ax.set(xlabel=_LABELS.get(x, x.replace("_", " ")), ylabel=_LABELS.get(y, y))
        if len(groups) > 1:
            legend_beside(ax, [_handle(i, names) for i, (names, _) in enumerate(groups)])
    return ax


def _places(values: pd.Series) -> dict[object, float] | None:
    """Give words their places on the axis; None for numbers, which have theirs."""
    if is_numeric_dtype(values):
        return None
    return {value: float(i) for i, value in enumerate(dict.fromkeys(values))}


def _draw_series(
    ax: Axes,
    rows: pd.DataFrame,
    columns: tuple[str, str],
    places: dict[object, float] | None,
    shift: float,
    number: int,
) -> None:
    x, y = columns
    colour, marker = style.run_colour(number), style.run_marker(number)
    at = rows[x].map(places) if places else rows[x].astype(float)
    ax.scatter(at + shift, rows[y], s=5, color=colour, alpha=0.45, linewidth=0)
    points = sorted((place, mean_of_repetitions(of[y])) for place, of in rows.groupby(at))
    where = np.array([place for place, _ in points]) + shift
    means = np.array([mean for _, (mean, _) in points])
    ends = np.array([tuple(interval) for _, (_, interval) in points])
    ax.errorbar(
        where,
        means,
        yerr=np.abs(ends.T - means),
        color=colour,
        marker=marker,
        markersize=4.5,
        mew=0,
        ls="" if places else style.run_line(number),
        lw=1,
        elinewidth=0.8,
        capsize=2,
    )


def _set_scale(ax: Axes, values: pd.Series, places: dict[object, float] | None) -> None:
    if places:
        ax.set_xticks(list(places.values()), [wrapped(str(word), 14) for word in places])
        ax.set_xlim(-0.5, len(places) - 0.5)
        return
    known = np.unique(values.astype(float))
    if len(known) > 2 and (is_wide(known) or known.max() >= 8 * known.min() > 0):
        ax.set_xscale("log")
    if len(known) <= 8:
        ax.set_xticks(known, [f"{value:g}" for value in known])
        ax.minorticks_off()


def _handle(number: int, names: tuple[object, ...]) -> Line2D:
    words = [style.method_name(str(name)) if i == 0 else str(name) for i, name in enumerate(names)]
    return dot(
        style.run_colour(number),
        wrapped(", ".join(words)),
        style.run_marker(number),
        ls=style.run_line(number),
    )
