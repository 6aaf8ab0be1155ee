"""A quantity layer by layer, methods overlaid: Figures 3 and 8 of the DoRA paper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from wda import style
from wda.figures.encoding import dot, draw_key, floored_handles, is_floored, legend_beside, wrapped
from wda.figures.panels import (
    QUANTITIES,
    checked,
    has_values,
    in_layers,
    is_wide,
    last_steps,
    new_axes,
    only,
    say,
    step_words,
    with_values,
)

_BOTH = ("delta_m", "delta_d")

# More lines than this are named in a key instead of at their ends.
_MOST_NAMED_AT_ENDS = 5

# Height of a line's name, in points, and its longest part on one line, in letters.
_NAME_HEIGHT = 8.5
_NAME_LETTERS = 16


@dataclass(frozen=True)
class _Series:
    """One line: a run, or the runs of one method that differ in their seeds."""

    name: str
    runs: tuple[str, ...]
    number: int


def profile(
    table: pd.DataFrame,
    quantity: str = "delta_m",
    ax: Axes | None = None,
    *,
    step: int | None = None,
) -> Axes:
    """Draw a quantity layer by layer: one line per run.

    Runs of one method and rank whose seeds are known and differ are one line, their mean, with a
    band from the least to the largest. Where a layer has several rows, such as heads or an encoder
    and a decoder, the mean of them is drawn; rows outside the layers are left out. Points under
    three times their floor are grey.

    Parameters
    ----------
    table : pandas.DataFrame
        A comparison's table, or any selection of its rows with one matrix label.
    quantity : str
        A column of the table: ``delta_m``, ``delta_d``, ``relative_update``, …
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure.
    step : int, optional
        Which checkpoint; by default each run's last.

    Returns
    -------
    matplotlib.axes.Axes
        With a line per run or method, named at its end, or in a legend where they are many.

    Raises
    ------
    TableError
        When the table lacks columns or numbers, has several matrix labels, or no row in a layer.
    """
    only(table, "matrix", "profile")
    rows = in_layers(checked(table, [quantity], "profile"), quantity, "profile")
    rows = last_steps(rows, step)
    with style.paper_style():
        ax = new_axes(ax)
        _draw_profile(ax, rows, quantity, _series(table))
        _name_lines(ax, rows, _series(table))
        ax.set(xlabel="layer", ylabel=_y_label(quantity))
    return ax


def profile_grid(
    table: pd.DataFrame,
    *,
    step: int | None = None,
    width: float = style.PAGE_WIDTH,
) -> Figure:
    """Draw the paper's Figure 8: ΔM above ΔD, a column of panels per matrix label.

    Parameters
    ----------
    table : pandas.DataFrame
        A comparison's table.
    step : int, optional
        Which checkpoint; by default each run's last.
    width : float
        Of the figure in inches, such as ``wda.style.NEURIPS_PAGE``.

    Returns
    -------
    matplotlib.figure.Figure
        Two rows of panels, each with its lines as :func:`profile` draws them.

    Raises
    ------
    TableError
        As :func:`profile` does.
    """
    rows = in_layers(checked(table, _BOTH, "profile"), "delta_m", "profile")
    with style.paper_style():
        return _grid(last_steps(rows, step), _BOTH, width)


def effective_rank_grid(summary: pd.DataFrame, *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the effective rank of the update layer by layer, a panel per matrix label.

    Parameters
    ----------
    summary : pandas.DataFrame
        The summary of the spectra, ``spectra.csv``.
    width : float
        Of the figure in inches.

    Returns
    -------
    matplotlib.figure.Figure
        A panel per matrix label, with lines as :func:`profile` draws them.

    Raises
    ------
    TableError
        When it lacks columns or numbers.
    """
    quantity = "effective_rank"
    rows = in_layers(with_values(summary, [quantity], "spectrum"), quantity, "spectrum")
    with style.paper_style():
        return _grid(last_steps(rows), (quantity,), width)


def _grid(rows: pd.DataFrame, quantities: tuple[str, ...], width: float) -> Figure:
    matrices, series = list(dict.fromkeys(rows["matrix"])), _series(rows)
    panel = max(width / max(3, len(matrices) + 0.5), 1.25)
    figure, axes = plt.subplots(
        len(quantities),
        len(matrices),
        figsize=(panel * len(matrices) + 0.35 * panel + 0.3, 1.75 * len(quantities) + 0.35),
        squeeze=False,
        layout="constrained",
        sharex="col",
    )
    for axes_row, quantity in zip(axes, quantities, strict=True):
        for ax, matrix in zip(axes_row, matrices, strict=True):
            of_matrix = rows[rows["matrix"] == matrix]
            if has_values(of_matrix, [quantity]):
                _draw_profile(ax, of_matrix, quantity, series)
            else:
                say(ax, "no finite values")
        axes_row[0].set_ylabel(_y_label(quantity))
    for ax, matrix in zip(axes[0], matrices, strict=True):
        ax.set_title(f"{wrapped(matrix, int(14 * panel))}, {step_words(rows)}")
    for ax in axes[-1]:
        ax.set_xlabel("layer")
    if len(series) > 1:
        draw_key(figure, axes, [*_handles(series), *floored_handles(rows)])
    return figure


def _series(table: pd.DataFrame) -> list[_Series]:
    """Group the runs of a method that differ in their seeds; every other run is a line alone."""
    ranks = table["rank"] if "rank" in table else pd.Series(pd.NA, table.index)
    runs = table.assign(rank=ranks).drop_duplicates("run")
    found = []
    for (method, _), of_method in runs.groupby(["method", "rank"], sort=False, dropna=False):
        seeds = of_method["seed"]
        if len(of_method) > 1 and seeds.notna().all() and seeds.is_unique:
            name = f"{style.method_name(str(method))} ({len(seeds)} seeds)"
            found.append((name, tuple(of_method["run"])))
        else:
            names = zip(of_method["run"], of_method["method"], strict=True)
            found += [(style.run_title(run, method), (run,)) for run, method in names]
    return [_Series(name, runs, i) for i, (name, runs) in enumerate(found)]


def _by_layer(
    rows: pd.DataFrame, quantity: str, series: list[_Series]
) -> Iterator[tuple[_Series, pd.DataFrame]]:
    """Give for every line its layers, with mean, least and largest over its runs."""
    for line in series:
        of_line = rows[rows["run"].isin(line.runs)]
        floored = of_line.assign(floored=is_floored(of_line)).groupby("layer")["floored"].all()
        of_runs = of_line.groupby(["run", "layer"])[quantity].mean()
        over_runs = of_runs.groupby("layer").agg(["mean", "min", "max"]).astype(float)
        if over_runs["mean"].notna().any():
            yield line, over_runs.assign(floored=floored)


def _draw_profile(ax: Axes, rows: pd.DataFrame, quantity: str, series: list[_Series]) -> None:
    for line, layers in _by_layer(rows, quantity, series):
        x = layers.index.to_numpy(float)
        colour, marker = style.run_colour(line.number), style.run_marker(line.number)
        grey = layers["floored"].to_numpy(bool)
        ax.plot(
            x,
            layers["mean"],
            color=colour,
            ls=style.run_line(line.number),
            lw=1,
            label=line.name,
            marker=marker,
            markersize=_marker_size(len(x)),
            markevery=list(np.flatnonzero(~grey)),
            mew=0,
        )
        if grey.any():
            ax.scatter(
                x[grey], layers["mean"][grey], c=style.FLOORED_COLOUR, marker=marker,
                s=_marker_size(len(x)) ** 2, linewidth=0, zorder=2.5,
            )  # fmt: skip
        if len(line.runs) > 1:
            ax.fill_between(x, layers["min"], layers["max"], color=colour, alpha=0.2, lw=0)
    if is_wide(rows[quantity].to_numpy(float)):
        ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if rows["layer"].nunique() == 1:
        ax.set_xlim(x[0] - 0.5, x[0] + 0.5)
    ax.margins(y=0.08)


def _marker_size(layers: int) -> float:
    """Give a marker's size in points that leaves the line of many layers to be seen."""
    return 4.0 if layers <= 24 else 2.0 if layers <= 48 else 0.0


def _name_lines(ax: Axes, rows: pd.DataFrame, series: list[_Series]) -> None:
    """Name the lines at their ends, moved apart where they are close; many in a legend."""
    floored = floored_handles(rows)
    if len(series) == 1 or len(series) > _MOST_NAMED_AT_ENDS:
        if handles := [*(_handles(series) if len(series) > 1 else []), *floored]:
            legend_beside(ax, handles)
        return
    names = [wrapped(line.name, _NAME_LETTERS) for line in series]
    lines = {line.get_label(): line for line in ax.lines}
    ends = [_last_height(ax, lines[line.name]) for line in series if line.name in lines]
    heights = [_NAME_HEIGHT * (1 + name.count("\n")) for name in names]
    height = ax.get_window_extent().height * 72 / ax.figure.dpi
    for line, name, y in zip(series, names, _apart(ends, heights, height), strict=False):
        ax.annotate(
            name,
            (1.02, y),
            xycoords="axes fraction",
            va="center",
            fontsize=7,
            color=style.run_colour(line.number),
            annotation_clip=False,
            linespacing=1.0,
        )
    if floored:
        ax.legend(handles=floored, loc="best")


def _last_height(ax: Axes, line: Line2D) -> float:
    """Give where a line ends, as a fraction of the Axes' height."""
    ax.autoscale_view()  # else the transforms are still those of an empty Axes
    x, y = np.asarray(line.get_xydata(), float).T
    last = np.flatnonzero(np.isfinite(y))[-1]
    return float(ax.transAxes.inverted().transform(ax.transData.transform((x[last], y[last])))[1])


def _apart(wanted: list[float], heights: list[float], height: float) -> np.ndarray:
    """Move names, whose heights are in points, so far apart that they do not overlap."""
    sizes = np.array(heights[: len(wanted)]) / height
    places = np.array(wanted)
    order = np.argsort(places, kind="stable")
    for below, above in pairwise(order):
        least = places[below] + (sizes[below] + sizes[above]) / 2
        places[above] = max(places[above], least)
    # What was pushed up is brought down by half, so that the names stay around their lines.
    pushed = float(np.max(places - np.array(wanted), initial=0.0))
    return np.asarray(places - pushed / 2)


def _handles(series: list[_Series]) -> list[Line2D]:
    return [
        dot(
            style.run_colour(line.number),
            wrapped(line.name),
            style.run_marker(line.number),
            ls=style.run_line(line.number),
        )
        for line in series
    ]


def _y_label(quantity: str) -> str:
    return QUANTITIES.get(quantity, quantity)
