"""One quantity as colour: layer × step, or layer × matrix."""

from __future__ import annotations

from typing import Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from wda import style
from wda.figures.encoding import FLOORED, is_floored, wrapped
from wda.figures.panels import (
    QUANTITIES,
    checked,
    grid_of_runs,
    in_layers,
    is_wide,
    last_steps,
    new_axes,
    only,
    step_words,
)

Across = Literal["step", "matrix"]

# Letters under a panel that fit beside each other.
_MOST_LETTERS = 16

# As many rows and columns get a tick each; of more, every second, fifth, … does.
_STRIDES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_MOST_TICKS = 10


def heatmap(
    table: pd.DataFrame,
    quantity: str = "delta_m",
    ax: Axes | None = None,
    *,
    across: Across = "step",
) -> Axes:
    """Draw a quantity of one run as colour, layers from bottom to top.

    Where a cell has several rows, such as heads or an encoder and a decoder, the mean is drawn.
    Cells under three times their floor are grey, cells without a number white. What spans more
    than a factor of thirty is coloured by its logarithm.

    Parameters
    ----------
    table : pandas.DataFrame
        Rows of one run, and for ``across="step"`` of one matrix label.
    quantity : str
        A column of the table: ``delta_m``, ``delta_d``, ``relative_update``, …
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure.
    across : {"step", "matrix"}
        What the columns are; matrices are shown at the run's last checkpoint.

    Returns
    -------
    matplotlib.axes.Axes
        With the cells, and a colour bar of its own.

    Raises
    ------
    TableError
        When the table lacks columns or numbers, or has several runs or matrix labels.
    """
    only(table, "run", "heatmap")
    if across == "step":
        only(table, "matrix", "heatmap")
    rows = in_layers(checked(table, [quantity], "heatmap"), quantity, "heatmap")
    with style.paper_style():
        ax = new_axes(ax)
        _draw_cells(ax, rows if across == "step" else last_steps(rows), quantity, across)
        ax.set(xlabel=across, ylabel="layer")
    return ax


def heatmap_grid(
    table: pd.DataFrame,
    quantity: str = "delta_m",
    *,
    across: Across = "step",
    width: float = style.PAGE_WIDTH,
) -> Figure:
    """Draw a heat map per run; for ``across="step"`` a row of them per matrix label.

    Parameters
    ----------
    table : pandas.DataFrame
        A comparison's table.
    quantity : str
        A column of the table: ``delta_m``, ``delta_d``, ``relative_update``, …
    across : {"step", "matrix"}
        What the columns are; matrices are shown at each run's last checkpoint.
    width : float
        Of the figure in inches, such as ``wda.style.NEURIPS_PAGE``.

    Returns
    -------
    matplotlib.figure.Figure
        Panels with colour bars of their own, for runs may differ by orders of magnitude.

    Raises
    ------
    TableError
        As :func:`heatmap` does, but for the number of runs and labels.
    """
    rows = in_layers(checked(table, [quantity], "heatmap"), quantity, "heatmap")
    name = QUANTITIES.get(quantity, quantity)
    if across == "matrix":
        rows = last_steps(rows)
        name += f", {step_words(rows)}"
        panels = rows.assign(matrix="")  # one panel for all of them
    else:
        panels = rows
    with style.paper_style():
        figure, _ = grid_of_runs(
            panels,
            [quantity],
            lambda ax, cells, *_: _draw_cells(ax, rows.loc[cells.index], quantity, across),
            (across, "layer"),
            width=width,
            bar=0.4,
        )
        figure.suptitle(name, fontsize=8)
        if is_floored(rows).any():
            handle = Patch(color=style.FLOORED_COLOUR, label=FLOORED)
            figure.legend(handles=[handle], loc="outside lower right")
    return figure


def _draw_cells(ax: Axes, rows: pd.DataFrame, quantity: str, across: Across) -> None:
    rows = rows.assign(floored=is_floored(rows))
    columns = rows[across].fillna(-1) if across == "step" else rows[across]
    groups = rows.groupby([rows["layer"].astype(int), columns], sort=False)
    order = sorted(columns.unique()) if across == "step" else list(dict.fromkeys(columns))
    cells = groups[quantity].mean().unstack().astype(float).sort_index()[order]
    floored = groups["floored"].all().unstack(fill_value=False).sort_index()[order].to_numpy(bool)
    crowded = max(cells.shape) > 2 * _MOST_TICKS
    values = np.ma.masked_invalid(np.where(floored, np.nan, cells))
    # Not seaborn's, which draws the whole figure anew for every panel.
    mesh = ax.pcolormesh(
        values, cmap=_colours(), norm=_norm(values.compressed()),
        edgecolors="face" if crowded else "white", linewidth=0.05 if crowded else 0.4,
    )  # fmt: skip
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.03, aspect=22)
    bar.outline.set_visible(False)
    ax.spines[:].set_visible(False)
    _mark_floored(ax, floored, 1.5 if crowded else 3.0)
    names = ["?" if name == -1 else wrapped(str(name), 14) for name in order]
    _set_ticks(ax, names, [str(layer) for layer in cells.index])


def _colours() -> ListedColormap:
    ramp = mpl.colormaps[style.RAMP]
    return ListedColormap(ramp(np.linspace(0, 0.97, 256)))


def _norm(values: np.ndarray) -> Normalize:
    """Choose a linear or a logarithmic scale for what is coloured."""
    if not values.size:
        return Normalize(0, 1)
    scale = LogNorm if is_wide(values) else Normalize
    return scale(values.min(), values.max())


def _mark_floored(ax: Axes, floored: np.ndarray, size: float) -> None:
    """Colour cells grey, with a cross for readers without colour."""
    y, x = np.nonzero(floored)
    for corner in zip(x.tolist(), y.tolist(), strict=True):
        ax.add_patch(Rectangle(corner, 1, 1, color=style.FLOORED_COLOUR, lw=0))
    if floored.any():
        ax.scatter(x + 0.5, y + 0.5, s=size**2, marker="x", color="0.45", linewidth=0.5)


def _set_ticks(ax: Axes, columns: list[str], rows: list[str]) -> None:
    for axis, names in ((ax.xaxis, columns), (ax.yaxis, rows)):
        stride = next(n for n in _STRIDES if len(names) <= n * _MOST_TICKS)
        shown = range(0, len(names), stride)
        axis.set_ticks([i + 0.5 for i in shown], labels=[names[i] for i in shown])
    letters = sum(len(label.get_text()) for label in ax.get_xticklabels())
    ax.tick_params(axis="x", rotation=90 if letters > _MOST_LETTERS else 0, length=2)
    ax.tick_params(axis="y", rotation=0, length=2)
