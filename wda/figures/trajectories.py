"""How each layer moves in the plane of ΔD and ΔM from checkpoint to checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wda import style
from wda.figures.encoding import (
    Encoding,
    RunEncoding,
    draw_key,
    floored_handles,
    is_floored,
    layer_handles,
    legend_beside,
)
from wda.figures.panels import X_LABEL, Y_LABEL, checked, grid_of_runs, new_axes

_NEEDED = ("delta_d", "delta_m")

# A layer's number is written at the end of its path where there are no more than this.
_MOST_NUMBERED = 12


def trajectory(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw each matrix's path from checkpoint to checkpoint, ΔM against ΔD, with an arrow.

    With one run in the table the colour is the layer, whose number stands at the end of the path;
    with several, colour and dashes are the run. The arrow lies on the longest part of the path and
    points to later steps. Checkpoints under three times their floor are grey.

    Parameters
    ----------
    table : pandas.DataFrame
        A comparison's table, or any selection of its rows.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        With one line per run and module.

    Raises
    ------
    TableError
        When the table lacks columns, rows or numbers, or mixes axes.
    """
    table = checked(table, _NEEDED, "trajectory")
    encoding, runs = Encoding(table), RunEncoding(table)
    with style.paper_style():
        ax = new_axes(ax)
        if len(runs) == 1:
            _draw_paths(ax, table, encoding)
            handles = layer_handles(encoding)
        else:
            _draw_paths(ax, table, encoding, runs)
            handles = runs.handles()
        legend_beside(ax, [*handles, *floored_handles(table)])
        ax.set(xlabel=X_LABEL, ylabel=Y_LABEL)
    return ax


def trajectory_grid(table: pd.DataFrame, *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the paths in one panel per run, and one row of panels per matrix label.

    Parameters
    ----------
    table : pandas.DataFrame
        A comparison's table.
    width : float
        Of the figure in inches, such as ``wda.style.NEURIPS_PAGE``.

    Returns
    -------
    matplotlib.figure.Figure
        Panels with axes of their own; a colour means the same layer in all of them.

    Raises
    ------
    TableError
        As :func:`trajectory` does.
    """
    table = checked(table, _NEEDED, "trajectory")
    encoding = Encoding(table)
    with style.paper_style():
        figure, axes = grid_of_runs(
            table,
            _NEEDED,
            lambda ax, rows, *_: _draw_paths(ax, rows, encoding),
            (X_LABEL, Y_LABEL),
            width=width,
            key=encoding.key_width + 0.3 * is_floored(table).any(),
        )
        draw_key(figure, axes, floored_handles(table), encoding)
    return figure


def _draw_paths(
    ax: Axes, rows: pd.DataFrame, encoding: Encoding, runs: RunEncoding | None = None
) -> None:
    rows = rows.assign(floored=is_floored(rows), layer=rows["layer"].fillna(-1))
    spread = np.array([np.ptp(rows[name].dropna()) for name in _NEEDED])
    numbered = runs is None and len(encoding.layers) <= _MOST_NUMBERED
    for (run, *_), path in rows.groupby(["run", "module", "head"], sort=False, dropna=False):
        path = path.dropna(subset=list(_NEEDED)).sort_values("step")  # noqa: PLW2901
        if path.empty:
            continue
        layer = path["layer"].iloc[0]
        colour = encoding.colours[layer] if runs is None else runs.colours[run]
        points = path[list(_NEEDED)].to_numpy(float)
        width = 0.5 if encoding.needs_bar else 0.9
        ls = "-" if runs is None else runs.lines[run]
        ax.plot(*points.T, color=colour, lw=width, ls=ls)
        size = 6.0 if len(encoding.steps) <= len(style.MARKERS) else 2 * width
        colours = [style.FLOORED_COLOUR if grey else colour for grey in path["floored"]]
        ax.scatter(points[:, 0], points[:, 1], c=colours, s=size, linewidth=0, zorder=2.5)
        _draw_arrow(ax, points, spread, colour, width)
        if numbered and layer >= 0:
            ax.annotate(
                str(layer), points[-1], (3, 2), textcoords="offset points", fontsize=6, color=colour
            )
    ax.margins(0.08)


def _draw_arrow(
    ax: Axes, points: np.ndarray, spread: np.ndarray, colour: Any, width: float
) -> None:
    """Put an arrow's head on the middle of the longest part of a path."""
    parts = np.diff(points, axis=0)
    lengths = np.hypot(*(parts / np.where(spread > 0, spread, 1)).T)
    if not lengths.size or not lengths.max() > 0:
        return
    longest = int(lengths.argmax())
    middle = points[longest] + 0.5 * parts[longest]
    ax.annotate(
        "",
        middle + 0.05 * parts[longest],
        middle,
        arrowprops={
            "arrowstyle": "-|>", "color": colour, "lw": width, "mutation_scale": 9 * width,
            "shrinkA": 0, "shrinkB": 0,
        },
    )  # fmt: skip
