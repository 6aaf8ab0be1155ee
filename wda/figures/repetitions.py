"""What the runs of a sweep came to against what was varied: the paper's Figures 4 and 5."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation, Transform
from pandas.api.types import is_numeric_dtype

from wda import style
from wda.figures.encoding import dot, legend_beside, wrapped
from wda.figures.panels import is_wide, new_axes, with_values
from wda.statistics import mean_of_repetitions

# How far lines are moved apart, in points.
_APART = 2.6

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
        With a legend where there are several lines that the axis does not tell apart.

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
        places, apart = _places(rows[x]), x in series
        for number, (_, of_series) in enumerate(groups):
            # Side by side, so that intervals of lines do not hide each other.
            shift = 0 if apart else _APART * (number - (len(groups) - 1) / 2)
            _draw_series(ax, of_series, (x, y), places, _shifted(ax, shift), number)
        _set_scale(ax, rows[x], places)
        ax.autoscale_view(scalex=places is None)
        ax.set(xlabel=_LABELS.get(x, x.replace("_", " ")), ylabel=_LABELS.get(y, y))
        if len(groups) > 1 and not apart:
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
    shifted: Transform,
    number: int,
) -> None:
    x, y = columns
    colour, marker = style.run_colour(number), style.run_marker(number)
    at = rows[x].map(places) if places else rows[x].astype(float)
    ax.scatter(at, rows[y], s=5, color=colour, alpha=0.45, linewidth=0, transform=shifted)
    points = sorted((place, mean_of_repetitions(of[y])) for place, of in rows.groupby(at))
    where = np.array([place for place, _ in points])
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
        transform=shifted,
    )
    # What is moved by points does not count where an Axes looks for its limits.
    ax.update_datalim(np.column_stack([at, rows[y]]))
    for heights in ends[np.isfinite(ends).all(axis=1)].T:
        ax.update_datalim(np.column_stack([where[np.isfinite(ends).all(axis=1)], heights]))


def _shifted(ax: Axes, points: float) -> Transform:
    """Give the Axes' coordinates, moved to the right by so many points."""
    assert isinstance(ax.figure, Figure)
    return ax.transData + ScaledTranslation(points / 72, 0, ax.figure.dpi_scale_trans)


def _set_scale(ax: Axes, values: pd.Series, places: dict[object, float] | None) -> None:
    if places:
        ax.set_xticks(
            list(places.values()), [wrapped(style.method_name(str(word)), 11) for word in places]
        )
        ax.set_xlim(-0.5, len(places) - 0.5)
        return
    known = np.unique(values.astype(float))
    if len(known) > 2 and (is_wide(known) or known.max() >= 8 * known.min() > 0):
        ax.set_xscale("log")
    positions = np.log(known) if ax.get_xscale() == "log" else known
    # Each value has its tick where there is room for what is written under it.
    if len(known) <= 8 and (np.diff(positions) > 0.08 * np.ptp(positions)).all():
        ax.set_xticks(known, [_tick(value) for value in known])
        ax.minorticks_off()


def _tick(value: float) -> str:
    """Write a number briefly, small ones with their power of ten."""
    return f"{value:.0e}".replace("e-0", "e-") if 0 < value < 0.01 else f"{value:g}"


def _handle(number: int, names: tuple[object, ...]) -> Line2D:
    words = [style.method_name(str(name)) if i == 0 else str(name) for i, name in enumerate(names)]
    return dot(
        style.run_colour(number),
        wrapped(", ".join(words)),
        style.run_marker(number),
        ls=style.run_line(number),
    )
