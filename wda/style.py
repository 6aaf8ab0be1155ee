"""How every figure looks: sizes, fonts, colours and markers. No data passes through here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

# Widths of one column and of the text at the usual venues, in inches, as their templates set them.
ICML_COLUMN, ICML_PAGE = 3.25, 6.75
ACL_COLUMN, ACL_PAGE = 3.03, 6.30
IEEE_COLUMN, IEEE_PAGE = 3.5, 7.16
NEURIPS_PAGE = ICLR_PAGE = 5.5

COLUMN_WIDTH, PAGE_WIDTH = ICML_COLUMN, ICML_PAGE

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

# Colours for runs on one Axes, from Okabe and Ito's set, told apart by colour-blind readers. The
# first three also differ most in grey; what comes after is told apart by marker and line.
RUN_COLOURS = ("#0072B2", "#E69F00", "#000000", "#D55E00", "#56B4E9", "#009E73", "#CC79A7")
RUN_LINES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)))

# What is said beside the data: fits, and rows that rounding alone could have made.
LINE_COLOUR = "0.2"
BAND_COLOUR = "0.55"
FLOORED_COLOUR = "0.78"

# From dark to light, ordered also when printed in grey. The lightest end is lost on white paper.
RAMP = "viridis"
_RAMP_END = 0.88

METHOD_NAMES = {
    "ft": "FT",
    "lora": "LoRA",
    "dora": "DoRA",
    "qlora": "QLoRA",
    "qdora": "QDoRA",
    "vera": "VeRA",
    "dvora": "DVoRA",
    "weightnorm": "weight norm.",
}

_RC: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so figures are the same everywhere
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.formatter.limits": (-2, 3),
    "axes.formatter.use_mathtext": True,
    "mathtext.fontset": "dejavusans",
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "figure.dpi": 110,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType, so that the text stays text
    "ps.fonttype": 42,
}


@contextmanager
def paper_style() -> Iterator[None]:
    """Draw in the house's style inside the block, and leave the user's settings as they were."""
    with plt.style.context(["default", _RC]):
        yield
        interactive = mpl.is_interactive()
    # The first figure loads the backend, and a notebook's turns this on: without, the next figures
    # would not be shown.
    mpl.interactive(interactive)


def layer_colours(layers: Sequence[int]) -> dict[int, tuple[float, float, float, float]]:
    """Give each layer a colour, dark to light with depth; ordered also when printed in grey."""
    ramp = mpl.colormaps[RAMP]
    last = max(1, len(layers) - 1)
    return {layer: ramp(_RAMP_END * i / last) for i, layer in enumerate(layers)}


def step_markers(steps: Sequence[int]) -> dict[int, str]:
    """Give each checkpoint a marker; one for all when there are more than can be told apart."""
    if len(steps) > len(MARKERS):
        return dict.fromkeys(steps, MARKERS[0])
    return dict(zip(steps, MARKERS, strict=False))


def step_sizes(steps: Sequence[int]) -> dict[int, float]:
    """Give each checkpoint a marker area in points²; it grows where one marker serves them all."""
    if len(steps) <= len(MARKERS):
        return dict.fromkeys(steps, 22.0)
    return growing_sizes(steps)


def growing_sizes(steps: Sequence[int]) -> dict[int, float]:
    """Give each checkpoint a marker area in points² that grows with the step."""
    last = max(1, len(steps) - 1)
    return {step: 6.0 + 34.0 * (i + (len(steps) == 1)) / last for i, step in enumerate(steps)}


def run_colour(number: int) -> str:
    """Give the colour of the first, second, … run on an Axes."""
    return RUN_COLOURS[number % len(RUN_COLOURS)]


def run_line(number: int) -> Any:
    """Give the dashes of the first, second, … run, for readers without colour."""
    return RUN_LINES[number % len(RUN_LINES)]


def run_marker(number: int) -> str:
    """Give the marker of the first, second, … run, for readers without colour."""
    return MARKERS[number % len(MARKERS)]


def method_name(method: str) -> str:
    """Give a method's usual spelling."""
    return METHOD_NAMES.get(method, method)


def run_title(run: str, method: str) -> str:
    """Name a run on a figure: the method's usual spelling where the run is called after it."""
    return method_name(method) if run == method else run
