"""Singular values of W0, Wt and ΔW."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from wda import style
from wda.errors import TableError
from wda.figures.encoding import draw_key, legend_beside
from wda.figures.panels import grid_of_runs, last_steps, new_axes, only, with_methods, with_values

# Which matrix → its name, and the number of its colour and dashes.
_MATRICES = {"w0": ("W0", 2), "wt": ("Wt", 1), "update": ("ΔW", 0)}

_VALUE = "singular_value"
_LABELS = ("index", "singular value")


def spectrum(values: pd.DataFrame, ax: Axes | None = None, *, step: int | None = None) -> Axes:
    """Draw the singular values of W0, Wt and ΔW, from the largest down, both axes logarithmic.

    Of several layers the median is the line, and the band reaches from the least to the largest.
    Values that are zero have no place on the axis.

    Parameters
    ----------
    values : pandas.DataFrame
        Singular values of one run and matrix label, as in ``spectra.parquet``.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure.
    step : int, optional
        Which checkpoint; by default the last.

    Returns
    -------
    matplotlib.axes.Axes
        With a line for each of the three matrices that is there.

    Raises
    ------
    TableError
        When columns or numbers are missing, or there are several runs or matrix labels.
    """
    only(values, "run", "spectrum")
    only(values, "matrix", "spectrum")
    rows = last_steps(_positive(values), step)
    with style.paper_style():
        ax = new_axes(ax)
        _draw_spectra(ax, rows)
        ax.set(xlabel=_LABELS[0], ylabel=_LABELS[1])
        legend_beside(ax, _handles(rows))
    return ax


def spectrum_grid(
    values: pd.DataFrame,
    *,
    methods: dict[str, str] | None = None,
    step: int | None = None,
    width: float = style.PAGE_WIDTH,
) -> Figure:
    """Draw the singular values in one panel per run, and one row of panels per matrix label.

    Parameters
    ----------
    values : pandas.DataFrame
        Singular values, as in ``spectra.parquet``.
    methods : dict of str to str, optional
        Run → method, as the table tells them; a run that is missing goes by its name.
    step : int, optional
        Which checkpoint; by default each run's last.
    width : float
        Of the figure in inches, such as ``wda.style.NEURIPS_PAGE``.

    Returns
    -------
    matplotlib.figure.Figure
        Panels with axes of their own.

    Raises
    ------
    TableError
        When columns or numbers are missing.
    """
    rows = last_steps(_positive(values), step)
    rows = with_methods(rows, methods)
    with style.paper_style():
        figure, axes = grid_of_runs(
            rows,
            [_VALUE],
            lambda ax, of_panel, *_: _draw_spectra(ax, of_panel),
            _LABELS,
            width=width,
            key=0.6,
        )
        draw_key(figure, axes, _handles(rows))
    return figure


def _positive(values: pd.DataFrame) -> pd.DataFrame:
    rows = with_values(values, [_VALUE], "spectrum")
    rows = rows[rows[_VALUE] > 0]
    if rows.empty:
        raise TableError("spectrum: all singular values are zero; there is nothing to draw")
    return rows


def _draw_spectra(ax: Axes, rows: pd.DataFrame) -> None:
    for of, (name, number) in _MATRICES.items():
        of_matrix = rows[rows["of"] == of]
        if of_matrix.empty:
            continue
        spread = of_matrix.groupby("index")[_VALUE].agg(["median", "min", "max"])
        x = spread.index.to_numpy() + 1
        colour = style.run_colour(number)
        # A single value is a point, for a line needs two.
        marker = "o" if len(x) == 1 else None
        ax.plot(
            x, spread["median"], color=colour, ls=style.run_line(number), lw=1.2, label=name,
            marker=marker, markersize=3,
        )  # fmt: skip
        if (spread["max"] > spread["min"]).any():
            ax.fill_between(x, spread["min"], spread["max"], color=colour, alpha=0.2, lw=0)
    ax.set(xscale="log", yscale="log")
    ax.set_ylim(bottom=_bottom(rows))


def _bottom(rows: pd.DataFrame) -> float:
    """Give the lower end of the axis: rounding's leftovers of what has rank 8 stay below it."""
    largest = rows.groupby("of")[_VALUE].max().to_numpy(float).min()
    return float(max(rows[_VALUE].min() / 2, largest * np.finfo(np.float32).eps))


def _handles(rows: pd.DataFrame) -> list[Line2D]:
    there = set(rows["of"])
    return [
        Line2D([], [], color=style.run_colour(n), ls=style.run_line(n), lw=1.2, label=name)
        for of, (name, n) in _MATRICES.items()
        if of in there
    ]
