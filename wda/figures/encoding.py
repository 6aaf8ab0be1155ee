"""What colours, markers and lines mean in a figure, and the keys that say so."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from wda import style

# More layers than this are explained by a colour bar instead of a legend.
MOST_IN_LEGEND = 12

# Letters that fit on a line of a legend.
_KEY_LETTERS = 20

# A name takes no more lines than this.
_MOST_LINES = 4

# Height of a line of a legend, in inches.
_LEGEND_LINE = 0.17

FLOORED = "below 3 × floor"


class Encoding:
    """Which colour is which layer, and which marker which checkpoint, throughout a figure."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.layers = sorted(set(table["layer"].fillna(-1)))
        self.steps = sorted(set(table["step"].fillna(-1)))
        self.colours = style.layer_colours(self.layers)
        self.markers = style.step_markers(self.steps)
        self.sizes = style.step_sizes(self.steps)

    @property
    def needs_bar(self) -> bool:
        """Whether there are too many layers for a legend."""
        return len(self.layers) > MOST_IN_LEGEND

    @property
    def key_width(self) -> float:
        """Give the width of the key beside the panels, in inches."""
        return 1.6 if self.needs_bar else 1.05


class RunEncoding:
    """Which colour, marker and dashes are which run, where several share one Axes."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.methods = dict(zip(table["run"], table["method"], strict=True))
        self._numbers = {run: number for number, run in enumerate(self.methods)}
        self.colours = {run: style.run_colour(n) for run, n in self._numbers.items()}
        self.markers = {run: style.run_marker(n) for run, n in self._numbers.items()}
        self.lines = {run: style.run_line(n) for run, n in self._numbers.items()}

    def __len__(self) -> int:
        return len(self.methods)

    def handles(self) -> list[Line2D]:
        """Explain every run by its marker on its line."""
        return [
            dot(
                self.colours[run],
                wrapped(style.run_title(run, method)),
                self.markers[run],
                ls=self.lines[run],
            )
            for run, method in self.methods.items()
        ]


def dot(
    colour: Any, label: str, marker: str = "o", markersize: float = 4.7, ls: Any = ""
) -> Line2D:
    """Make one entry of a legend."""
    return Line2D(
        [], [], ls=ls, lw=1, marker=marker, color=colour, label=label, markersize=markersize, mew=0
    )


def wrapped(name: str, letters: int = _KEY_LETTERS) -> str:
    """Break a long name over lines, best at a mark in it; a very long one loses its middle."""
    if len(name) > _MOST_LINES * letters:
        name = name[: 2 * letters - 1] + "…" + name[-letters:]
    pieces = re.findall(rf"[^-_/. ]{{0,{letters - 1}}}[-_/. ]|[^-_/. ]{{1,{letters}}}", name)
    lines = [""]
    for piece in pieces:
        if len(lines[-1]) + len(piece) > letters:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def layer_name(layer: int) -> str:
    """Name a layer; −1 stands for what is in none."""
    return "outside layers" if layer < 0 else f"layer {layer}"


def some_of(values: Sequence[Any], most: int) -> list[Any]:
    """Give at most so many of a sequence, evenly, with its ends."""
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, most).astype(int))]


def layer_handles(encoding: Encoding) -> list[Line2D]:
    """Explain the colours; of many layers some."""
    layers = encoding.layers
    if encoding.needs_bar:
        layers = some_of(layers, 6)
    return [dot(encoding.colours[layer], layer_name(layer)) for layer in layers]


def step_handles(encoding: Encoding, sizes: dict[int, float] | None = None) -> list[Line2D]:
    """Explain the markers, or the sizes alone; of many the first, the middle and the last."""
    steps = encoding.steps
    if len(steps) > len(style.MARKERS) or (sizes is not None and len(steps) > 3):
        steps = [steps[0], steps[len(steps) // 2], steps[-1]]
    return [
        dot(
            "0.4",
            "step unknown" if step < 0 else f"step {step}",
            marker="o" if sizes is not None else encoding.markers[step],
            markersize=(sizes or encoding.sizes)[step] ** 0.5,
        )
        for step in steps
    ]


def floored_handles(table: pd.DataFrame) -> list[Line2D]:
    """Explain the grey points, where there are any."""
    return [dot(style.FLOORED_COLOUR, FLOORED)] if is_floored(table).any() else []


def is_floored(table: pd.DataFrame) -> np.ndarray:
    """Tell which rows are under three times what rounding alone would give."""
    if "below_floor" not in table:
        return np.zeros(len(table), bool)
    return table["below_floor"].astype("boolean").fillna(False).to_numpy(bool)


def draw_key(
    figure: Figure, axes: np.ndarray, handles: Sequence[Artist], encoding: Encoding | None = None
) -> None:
    """Explain everything once for all panels, at their right; layers first."""
    if encoding is not None and encoding.needs_bar:
        _draw_layer_bar(figure, axes, encoding)
    elif encoding is not None:
        handles = [*layer_handles(encoding), *handles]
    if not handles:
        return
    height = sum(1 + str(handle.get_label()).count("\n") for handle in handles) * _LEGEND_LINE
    columns = -(-height // figure.get_figheight())
    figure.legend(handles=list(handles), loc="outside right center", ncols=int(columns))


def _draw_layer_bar(figure: Figure, axes: np.ndarray, encoding: Encoding) -> None:
    layers = encoding.layers
    colours = ListedColormap([encoding.colours[layer] for layer in layers])
    norm = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers))
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="layer", aspect=30)
    shown = some_of(range(len(layers)), 9)
    bar.set_ticks(shown, labels=[str(layers[i]) if layers[i] >= 0 else "–" for i in shown])
    bar.minorticks_off()


def legend_beside(ax: Axes, handles: Sequence[Artist]) -> None:
    """Put the key at the right of one Axes."""
    ax.legend(handles=list(handles), loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
