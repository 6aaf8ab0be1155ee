"""How the changes of single vectors are spread in each layer."""

from __future__ import annotations

from typing import Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wda import style
from wda.figures.panels import (
    QUANTITIES,
    grid_of_runs,
    in_layers,
    last_steps,
    new_axes,
    only,
    step_words,
    with_methods,
    with_values,
)

Change = Literal["magnitude_change", "direction_change"]

# Ends of the whiskers: 5 % and 95 % of the vectors, as the quantiles of the table.
_WHISKERS = (5, 95)


def vectors(
    frame: pd.DataFrame,
    quantity: Change = "magnitude_change",
    ax: Axes | None = None,
    *,
    step: int | None = None,
) -> Axes:
    """Draw how the changes of single vectors are spread, a box per layer.

    The box holds the middle half of the vectors, its line is the median, and the whiskers reach
    from 5 % to 95 %. Magnitudes above zero grew, those below shrank.

    Parameters
    ----------
    frame : pandas.DataFrame
        Changes vector by vector of one run and matrix label, as in ``vectors.parquet``.
    quantity : {"magnitude_change", "direction_change"}
        m_t − m_0 in units of the weight, or 1 − cos(w_t, w_0), 0 to 2.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure.
    step : int, optional
        Which checkpoint; by default the last.

    Returns
    -------
    matplotlib.axes.Axes
        With a box per layer.

    Raises
    ------
    TableError
        When columns or numbers are missing, or there are several runs or matrix labels.
    """
    only(frame, "run", "vectors")
    only(frame, "matrix", "vectors")
    rows = last_steps(_checked(frame, quantity), step)
    with style.paper_style():
        ax = new_axes(ax)
        _draw_boxes(ax, rows, quantity)
        ax.set(xlabel="layer", ylabel=QUANTITIES[quantity])
    return ax


def vectors_grid(
    frame: pd.DataFrame,
    quantity: Change = "magnitude_change",
    *,
    methods: dict[str, str] | None = None,
    step: int | None = None,
    width: float = style.PAGE_WIDTH,
) -> Figure:
    """Draw the boxes in one panel per run, and one row of panels per matrix label.

    Parameters
    ----------
    frame : pandas.DataFrame
        Changes vector by vector, as in ``vectors.parquet``.
    quantity : {"magnitude_change", "direction_change"}
        As for :func:`vectors`.
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
    rows = last_steps(_checked(frame, quantity), step)
    rows = with_methods(rows, methods)
    with style.paper_style():
        figure, _ = grid_of_runs(
            rows,
            [quantity],
            lambda ax, of_panel, *_: _draw_boxes(ax, of_panel, quantity),
            ("layer", QUANTITIES[quantity]),
            width=width,
        )
        figure.suptitle(f"vector by vector, {step_words(rows)}", fontsize=8)
    return figure


def _checked(frame: pd.DataFrame, quantity: Change) -> pd.DataFrame:
    return in_layers(with_values(frame, [quantity], "vectors"), quantity, "vectors")


def _draw_boxes(ax: Axes, rows: pd.DataFrame, quantity: Change) -> None:
    known = rows.dropna(subset=[quantity])
    layers = sorted(int(layer) for layer in known["layer"].unique())
    thin = 0.7 if len(layers) <= 24 else 0.35
    dark = style.RUN_COLOURS[0]
    ax.boxplot(
        [known.loc[known["layer"] == layer, quantity] for layer in layers],
        positions=layers,
        whis=_WHISKERS,
        widths=0.6,
        showfliers=False,
        showcaps=False,
        patch_artist=True,
        manage_ticks=False,
        boxprops={"facecolor": style.RUN_COLOURS[4], "edgecolor": dark, "linewidth": thin},
        medianprops={"color": "black", "linewidth": 2 * thin},
        whiskerprops={"color": dark, "linewidth": thin},
    )
    if rows[quantity].min() < 0:
        ax.axhline(0, color=style.LINE_COLOUR, lw=0.6, ls=":", zorder=0.5)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    ax.set_xlim(min(layers) - 0.6, max(layers) + 0.6)
