"""The measured correlation among those of random updates."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wda import style
from wda.draws import Draws
from wda.figures.fits import correlation, fit_of, fits_of, interval, number, write_above
from wda.figures.panels import checked, grid_of_runs, label_of, new_axes, numbered, only, say

_NEEDED = ("delta_d", "delta_m")
_LABELS = ("Pearson's r", "draws")


def null(
    table: pd.DataFrame, statistics: pd.DataFrame, draws: Draws, ax: Axes | None = None
) -> Axes:
    """Draw the r of one run among the r's of random updates of the same size.

    The histogram is that of the draws, the shaded band ``null_r_low`` to ``null_r_high`` and the
    p-value ``null_p`` of the statistics, the line the measured r. A line inside the band says that
    the run shows no more than chance.

    Parameters
    ----------
    table : pandas.DataFrame
        Rows of one run.
    statistics : pandas.DataFrame
        The fits that belong to it.
    draws : Draws
        Random updates, row by row as the table.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        With the histogram and the line.

    Raises
    ------
    TableError
        When the table lacks columns or numbers, has several runs, or the draws are of another.
    """
    run = only(table, "run", "null")
    table = numbered(checked(table, _NEEDED, "null"), draws)
    with style.paper_style():
        ax = new_axes(ax)
        _draw_null(ax, fit_of(statistics, run, label_of(table)), draws)
        ax.set(xlabel=_LABELS[0], ylabel=_LABELS[1])
    return ax


def null_grid(
    table: pd.DataFrame,
    statistics: pd.DataFrame,
    draws: Draws,
    *,
    width: float = style.PAGE_WIDTH,
) -> Figure:
    """Draw the measured among the random r's, per run and matrix label.

    Parameters
    ----------
    table : pandas.DataFrame
        A comparison's table.
    statistics : pandas.DataFrame
        Its fits.
    draws : Draws
        Random updates, row by row as the table.
    width : float
        Of the figure in inches, such as ``wda.style.NEURIPS_PAGE``.

    Returns
    -------
    matplotlib.figure.Figure
        Panels with axes of their own.

    Raises
    ------
    TableError
        When the table lacks columns or numbers, or the draws belong to another.
    """
    table = numbered(checked(table, _NEEDED, "null"), draws)

    def draw(ax: Axes, rows: pd.DataFrame, run: str, matrix: str) -> None:
        _draw_null(ax, fit_of(statistics, run, matrix), draws.of(rows["row_number"].to_numpy()))

    with style.paper_style():
        figure, _ = grid_of_runs(table, _NEEDED, draw, _LABELS, width=width)
    return figure


def _draw_null(ax: Axes, fit: pd.Series, draws: Draws) -> None:
    random, _, _ = fits_of(draws)
    random = random[np.isfinite(random)]
    if not random.size:
        say(ax, "no r of\nrandom updates")
        return
    bins = min(40, max(10, int(random.size**0.5)))
    sns.histplot(
        random, bins=bins, color=style.RUN_COLOURS[4], edgecolor="white", linewidth=0.2, ax=ax
    )
    # As high as the histogram, so that the words stand clear of them.
    top = ax.get_ylim()[1]
    band = [number(fit, "null_r_low"), number(fit, "null_r_high")]
    if np.isfinite(band).all():
        ax.fill_between(band, 0, top, color=style.BAND_COLOUR, alpha=0.3, lw=0, zorder=0.5)
    r = number(fit, "pearson_r")
    # Draws far from what was measured may all fall into one thin bin.
    ax.vlines(np.median(random), 0, top, color=style.RUN_COLOURS[4], lw=1, zorder=0.8)
    if np.isfinite(r):
        ax.vlines(r, 0, top, color=style.RUN_COLOURS[2], lw=1.4)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.set_ylim(0, top)
    _write(ax, fit, r, draws)


def _write(ax: Axes, fit: pd.Series, r: float, draws: Draws) -> None:
    """Say measured r, band and p above the histogram."""
    kinds = np.unique(draws.null)
    lines = [f"measured r = {correlation(r)}" if np.isfinite(r) else "no measured r"]
    if band := interval(fit, "null_r_low", "null_r_high"):
        lines.append(f"{kinds[0] if len(kinds) == 1 else 'random'}:{band}")
    p = number(fit, "null_p")
    if np.isfinite(p):
        lines.append("p < 0.001" if p < 0.001 else f"p = {p:.2g}")
    write_above(ax, "\n".join(lines))
