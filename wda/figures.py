"""Table and fits → pictures. Whatever is drawn was computed before and stands in the tables."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from wda import style
from wda.errors import TableError
from wda.statistics import ALL
from wda.table import check_table

X_LABEL = "ΔD"
Y_LABEL = "ΔM"

# More layers than this are explained by a colour bar instead of a legend.
_MOST_IN_LEGEND = 12

# Letters of a title that fit above a panel.
_TITLE_LETTERS = 24

# Height of a line of a legend, in inches.
_LEGEND_LINE = 0.17


def scatter(table: pd.DataFrame, statistics: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw ΔM against ΔD on one Axes: a point per matrix, layer and checkpoint, and the fit.

    With one run in the table the colour is the layer, as in Figure 2 of the DoRA paper; with
    several the colour is the run. The marker is the checkpoint. The line is the row of
    ``statistics`` for the one matrix label in the table, or for ``all`` of them.

    Parameters
    ----------
    table : pandas.DataFrame
        A comparison's table, or any selection of its rows.
    statistics : pandas.DataFrame
        The fits that belong to it.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default on a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        With the points, one line per run, and a legend.

    Raises
    ------
    TableError
        When the table lacks columns or has no rows.
    """
    table = check_table(table)
    with style.paper_style():
        if ax is None:
            _, ax = plt.subplots(figsize=(style.COLUMN_WIDTH, 0.8 * style.COLUMN_WIDTH))
        runs = list(dict.fromkeys(table["run"]))
        if len(runs) == 1:
            _draw_points(ax, table, _Encoding(table))
            handles = _layer_handles(_Encoding(table))
        else:
            colours = dict(zip(runs, _cycle(style.RUN_COLOURS, len(runs)), strict=True))
            _draw_points(ax, table, _Encoding(table), run_colours=colours)
            methods = dict(zip(table["run"], table["method"], strict=True))
            handles = [_dot(colours[run], style.run_title(run, methods[run])) for run in runs]
        for run in runs:
            colour = "0.2" if len(runs) == 1 else colours[run]
            fit = _fit(statistics, run, _label_of(table))
            _draw_line(ax, table[table["run"] == run], fit, colour)
            if len(runs) == 1:
                _write_fit(ax, fit)
        ax.set(xlabel=X_LABEL, ylabel=Y_LABEL)
        ax.legend(
            handles=[*handles, *_step_handles(_Encoding(table))],
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
        )
    return ax


def scatter_grid(table: pd.DataFrame, statistics: pd.DataFrame) -> Figure:
    """Draw the paper's Figure 2: one panel per run, and one row of panels per matrix label.

    Parameters
    ----------
    table : pandas.DataFrame
        A comparison's table.
    statistics : pandas.DataFrame
        Its fits.

    Returns
    -------
    matplotlib.figure.Figure
        Panels with axes of their own; colours and markers mean the same in all of them.

    Raises
    ------
    TableError
        When the table lacks columns or has no rows.
    """
    table = check_table(table)
    runs = list(dict.fromkeys(zip(table["run"], table["method"], strict=True)))
    labels = list(dict.fromkeys(table["matrix"]))
    encoding = _Encoding(table)
    with style.paper_style():
        # Three panels and the key beside them fill a page's width.
        key = 1.05 if len(encoding.layers) <= _MOST_IN_LEGEND else 1.6
        figure, axes = plt.subplots(
            len(labels),
            len(runs),
            figsize=((style.PAGE_WIDTH - 1.05) / 3 * len(runs) + key, 2.05 * len(labels) + 0.3),
            squeeze=False,
            layout="constrained",
        )
        for row, label in enumerate(labels):
            for column, (run, method) in enumerate(runs):
                ax = axes[row, column]
                points = table[(table["run"] == run) & (table["matrix"] == label)]
                if points.empty:
                    _say_empty(ax)
                else:
                    _draw_points(ax, points, encoding)
                    fit = _fit(statistics, run, label)
                    _draw_line(ax, points, fit, "0.2")
                    _write_fit(ax, fit)
                if row == 0:
                    title = style.run_title(run, method)
                    ax.set_title(textwrap.fill(title, _TITLE_LETTERS))
                if column == 0:
                    ax.set_ylabel(f"{label}: {Y_LABEL}" if len(labels) > 1 else Y_LABEL)
                if row == len(labels) - 1:
                    ax.set_xlabel(X_LABEL)
        _draw_key(figure, axes, encoding)
    return figure


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure as PNG and PDF, and close it."""
    with style.paper_style():
        for ending in ("png", "pdf"):
            # No date in the file, so that the same table gives the same bytes.
            metadata = {"CreationDate": None} if ending == "pdf" else {"Software": "wda"}
            figure.savefig(folder / f"{name}.{ending}", metadata=metadata)
    plt.close(figure)


class _Encoding:
    """Which colour is which layer, and which marker which checkpoint, throughout a figure."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.layers = sorted(set(table["layer"].fillna(-1)))
        self.steps = sorted(set(table["step"].fillna(-1)))
        self.colours = style.layer_colours(self.layers)
        self.markers = style.step_markers(self.steps)
        self.sizes = style.step_sizes(self.steps)


def _say_empty(ax: Axes) -> None:
    ax.text(0.5, 0.5, "no such matrix\nin this run", ha="center", transform=ax.transAxes)
    ax.set(xticks=[], yticks=[])


def _draw_points(
    ax: Axes,
    points: pd.DataFrame,
    encoding: _Encoding,
    run_colours: dict[str, Any] | None = None,
) -> None:
    sns.scatterplot(
        points.assign(layer=points["layer"].fillna(-1), step=points["step"].fillna(-1)),
        x="delta_d",
        y="delta_m",
        hue="layer" if run_colours is None else "run",
        palette=encoding.colours if run_colours is None else run_colours,
        style="step",
        markers=encoding.markers,
        size="step",
        sizes=encoding.sizes,
        edgecolor="white",
        # A rim tells neighbours apart; around the small points of a long run it would be all.
        linewidth=0.3 if len(encoding.steps) <= len(style.MARKERS) else 0,
        legend=False,
        ax=ax,
    )
    ax.set(xlabel="", ylabel="")


def _draw_line(ax: Axes, points: pd.DataFrame, fit: pd.Series, colour: Any) -> None:
    if np.isfinite(fit["slope"]):
        x = np.array([points["delta_d"].min(), points["delta_d"].max()])
        ax.plot(x, fit["slope"] * x + fit["intercept"], color=colour, lw=1, zorder=1.5)


def _write_fit(ax: Axes, fit: pd.Series) -> None:
    """Write r and slope above the points, in room made for it."""
    r, slope = fit["pearson_r"], fit["slope"]
    text = f"r = {r:+.2f}" if np.isfinite(r) else f"no r from n = {fit['n']}"
    if np.isfinite(slope):
        text += f"\nslope = {slope:+.3g}"
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.28 * (high - low))
    ax.text(0.04, 0.98, text, va="top", transform=ax.transAxes, fontsize="small")


def _draw_key(figure: Figure, axes: np.ndarray, encoding: _Encoding) -> None:
    """Explain colours and markers once for all panels, at their right."""
    handles = _step_handles(encoding)
    if len(encoding.layers) <= _MOST_IN_LEGEND:
        handles = _layer_handles(encoding) + handles
    else:
        _draw_layer_bar(figure, axes, encoding)
    lines = int(figure.get_figheight() / _LEGEND_LINE)
    figure.legend(handles=handles, loc="outside right center", ncols=-(-len(handles) // lines))


def _draw_layer_bar(figure: Figure, axes: np.ndarray, encoding: _Encoding) -> None:
    layers = encoding.layers
    colours = ListedColormap([encoding.colours[layer] for layer in layers])
    norm = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers))
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="layer", aspect=30)
    shown = np.unique(np.linspace(0, len(layers) - 1, 9).astype(int))
    bar.set_ticks(list(shown), labels=[str(layers[i]) for i in shown])
    bar.minorticks_off()


def _layer_handles(encoding: _Encoding) -> list[Line2D]:
    layers = encoding.layers
    if len(layers) > _MOST_IN_LEGEND:
        layers = [layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, 6).astype(int))]
    return [
        _dot(encoding.colours[layer], "outside layers" if layer < 0 else f"layer {layer}")
        for layer in layers
    ]


def _step_handles(encoding: _Encoding) -> list[Line2D]:
    """Explain the markers; of a long sequence the first, the middle and the last."""
    steps = encoding.steps
    if len(steps) > len(style.MARKERS):
        steps = [steps[0], steps[len(steps) // 2], steps[-1]]
    return [
        _dot(
            "0.4",
            "step unknown" if step < 0 else f"step {step}",
            marker=encoding.markers[step],
            markersize=encoding.sizes[step] ** 0.5,
        )
        for step in steps
    ]


def _dot(colour: Any, label: str, marker: str = "o", markersize: float = 4.7) -> Line2D:
    return Line2D(
        [], [], ls="", marker=marker, color=colour, label=label, markersize=markersize, mew=0
    )


def _label_of(table: pd.DataFrame) -> str:
    """Give the one matrix label of a table, or the word for all of several."""
    labels = table["matrix"].unique()
    return str(labels[0]) if len(labels) == 1 else ALL


def _fit(statistics: pd.DataFrame, run: str, label: str) -> pd.Series:
    """Give the row of the statistics that belongs to a run and label.

    Raises
    ------
    TableError
        When there is none.
    """
    rows = statistics[(statistics["run"] == run) & (statistics["matrix"] == label)]
    if rows.empty:
        raise TableError(
            f"statistics: no row for run {run!r}, matrix {label!r}; compute them from this table"
        )
    return rows.iloc[0]


def _cycle(colours: Sequence[str], count: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(count)]
