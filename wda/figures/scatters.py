"""ΔM against ΔD, a point per matrix, layer and checkpoint: Figures 2 and 7 of the DoRA paper."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from wda import style
from wda.draws import Draws
from wda.figures.encoding import (
    Encoding,
    RunEncoding,
    draw_key,
    floored_handles,
    is_floored,
    layer_handles,
    legend_beside,
    step_handles,
)
from wda.figures.fits import (
    CROWD,
    draw_floor,
    draw_interval,
    draw_line,
    draw_null,
    fit_of,
    words_of,
    write_above,
)
from wda.figures.panels import X_LABEL, Y_LABEL, checked, grid_of_runs, label_of, new_axes, numbered

_NEEDED = ("delta_d", "delta_m")


def scatter(
    table: pd.DataFrame,
    statistics: pd.DataFrame,
    ax: Axes | None = None,
    *,
    interval: bool = False,
    draws: Draws | None = None,
    floor: bool = False,
) -> Axes:
    """Draw ΔM against ΔD on one Axes: a point per matrix, layer and checkpoint, and the fit.

    With one run in the table the colour is the layer and the marker the checkpoint, as in Figure 2
    of the DoRA paper; with several, colour and marker are the run, and size is the checkpoint.
    The line is the row of ``statistics`` for the one matrix label in the table, or for ``all`` of
    them. Points under three times their floor are grey.

    Parameters
    ----------
    table : pandas.DataFrame
        A comparison's table, or any selection of its rows.
    statistics : pandas.DataFrame
        The fits that belong to it.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure.
    interval : bool
        Whether to shade the slope's 95 % interval, ``slope_low`` to ``slope_high``.
    draws : Draws, optional
        Random updates, row by row as the table; where 95 % of their lines lie is hatched.
    floor : bool
        Whether to draw three times the largest floor of ΔM and of ΔD, dotted.

    Returns
    -------
    matplotlib.axes.Axes
        With the points, one line per run, and a legend.

    Raises
    ------
    TableError
        When the table lacks columns, rows or numbers, mixes axes, or something asked for is not
        told by what was given.
    """
    table = numbered(checked(table, _NEEDED, "scatter"), draws)
    encoding, runs = Encoding(table), RunEncoding(table)
    with style.paper_style():
        ax = new_axes(ax)
        if len(runs) == 1:
            _draw_points(ax, table, encoding)
            handles = [*layer_handles(encoding), *step_handles(encoding)]
        else:
            sizes = style.growing_sizes(encoding.steps)
            _draw_points(ax, table, encoding, runs)
            handles = [*runs.handles(), *step_handles(encoding, sizes)]
        _draw_extras(ax, table, draws, floor)
        for run in runs.methods:
            points = table[table["run"] == run]
            fit = fit_of(statistics, run, label_of(table))
            colour = style.LINE_COLOUR if len(runs) == 1 else runs.colours[run]
            draw_line(ax, points, fit, colour, runs.lines[run])
            if interval:
                draw_interval(ax, points, fit, colour)
            if len(runs) == 1:
                write_above(ax, words_of(fit))
        ax.set(xlabel=X_LABEL, ylabel=Y_LABEL)
        extras = _extra_handles(interval, draws, floor)
        legend_beside(ax, [*handles, *floored_handles(table), *extras])
    return ax


def scatter_grid(
    table: pd.DataFrame,
    statistics: pd.DataFrame,
    *,
    interval: bool = False,
    draws: Draws | None = None,
    floor: bool = False,
    width: float = style.PAGE_WIDTH,
) -> Figure:
    """Draw the paper's Figure 2: one panel per run, and one row of panels per matrix label.

    Parameters
    ----------
    table : pandas.DataFrame
        A comparison's table.
    statistics : pandas.DataFrame
        Its fits.
    interval : bool
        Whether to shade the slope's 95 % interval, as :func:`scatter` does.
    draws : Draws, optional
        Random updates, row by row as the table; where 95 % of their lines lie is hatched.
    floor : bool
        Whether to draw three times the largest floor of each panel, dotted.
    width : float
        Of the figure in inches, such as ``wda.style.NEURIPS_PAGE``.

    Returns
    -------
    matplotlib.figure.Figure
        Panels with axes of their own; colours and markers mean the same in all of them.

    Raises
    ------
    TableError
        As :func:`scatter` does.
    """
    table = numbered(checked(table, _NEEDED, "scatter"), draws)
    encoding = Encoding(table)

    def draw(ax: Axes, points: pd.DataFrame, run: str, matrix: str) -> None:
        _draw_points(ax, points, encoding)
        _draw_extras(ax, points, draws, floor)
        fit = fit_of(statistics, run, matrix)
        draw_line(ax, points, fit, style.LINE_COLOUR)
        if interval:
            draw_interval(ax, points, fit, style.LINE_COLOUR)
        write_above(ax, words_of(fit))

    with style.paper_style():
        extras = _extra_handles(interval, draws, floor)
        key = encoding.key_width + 0.3 * bool(extras or is_floored(table).any())
        figure, axes = grid_of_runs(table, _NEEDED, draw, (X_LABEL, Y_LABEL), width=width, key=key)
        handles = [*step_handles(encoding), *floored_handles(table), *extras]
        draw_key(figure, axes, handles, encoding)
    return figure


def _draw_extras(ax: Axes, points: pd.DataFrame, draws: Draws | None, floor: bool) -> None:
    if draws is not None:
        for run_rows in points.groupby("run", sort=False)["row_number"]:
            draw_null(ax, draws.of(run_rows[1].to_numpy()))
    if floor:
        draw_floor(ax, points)


def _extra_handles(interval: bool, draws: Draws | None, floor: bool) -> list[Artist]:
    handles: list[Artist] = []
    if interval:
        handles.append(Patch(facecolor=style.LINE_COLOUR, alpha=0.18, label="95 % of slope"))
    if draws is not None:
        colour = style.BAND_COLOUR
        handles.append(
            Patch(facecolor="none", edgecolor=colour, hatch="//////", lw=0.5, label="random")
        )
    if floor:
        handles.append(Line2D([], [], color=style.BAND_COLOUR, lw=0.8, ls=":", label="3 × floor"))
    return handles


def _draw_points(
    ax: Axes, points: pd.DataFrame, encoding: Encoding, runs: RunEncoding | None = None
) -> None:
    """Draw the points; with ``runs`` their colour and marker are the run's."""
    points = points.assign(layer=points["layer"].fillna(-1), step=points["step"].fillna(-1))
    floored = is_floored(points)
    look: dict[str, object] = (
        {"hue": "layer", "palette": encoding.colours, "style": "step", "markers": encoding.markers}
        if runs is None
        else {"hue": "run", "palette": runs.colours, "style": "run", "markers": runs.markers}
    )
    sizes = encoding.sizes if runs is None else style.growing_sizes(encoding.steps)
    if len(points) > CROWD:
        sizes = {step: 0.25 * size for step, size in sizes.items()}
    for rows, is_grey in ((points[floored], True), (points[~floored], False)):
        if rows.empty:
            continue
        grey = dict.fromkeys(look["palette"], style.FLOORED_COLOUR)  # type: ignore[call-overload]
        sns.scatterplot(
            rows,
            x="delta_d",
            y="delta_m",
            size="step",
            sizes=sizes,
            edgecolor="white",
            # A rim tells neighbours apart; around the small points of a long run it would be all.
            linewidth=0.3 if len(encoding.steps) <= len(style.MARKERS) else 0,
            legend=False,
            ax=ax,
            **{**look, **({"palette": grey} if is_grey else {})},
        )
    ax.set(xlabel="", ylabel="")
