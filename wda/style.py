"""How every figure looks: sizes, fonts, colours and markers. No data passes through here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

# Text widths of the usual two-column venues, in inches.
COLUMN_WIDTH = 3.25
PAGE_WIDTH = 6.75

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

# Colours for runs on one Axes: Okabe and Ito's set, told apart by colour-blind readers.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

METHOD_NAMES = {"ft": "FT", "lora": "LoRA", "dora": "DoRA"}

_RC: Any = {
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
    "figure.dpi": 110,
    "savefig.dpi": 300,
    "savefig.bbox": "tight",
    "pdf.fonttype": 42,  # TrueType, so that the text stays text
    "ps.fonttype": 42,
}


@contextmanager
def paper_style() -> Iterator[None]:
    """Draw in the house's style inside the block, and leave the user's settings as they were."""
    with mpl.rc_context(_RC):
        yield


def layer_colours(layers: Sequence[int]) -> dict[int, tuple[float, float, float, float]]:
    """Give each layer a colour, dark to light with depth; ordered also when printed in grey."""
    ramp = plt.get_cmap("viridis")
    last = max(1, len(layers) - 1)
    return {layer: ramp(0.88 * i / last) for i, layer in enumerate(layers)}


def step_markers(steps: Sequence[int]) -> dict[int, str]:
    """Give each checkpoint a marker; one for all when there are more than can be told apart."""
    if len(steps) > len(MARKERS):
        return dict.fromkeys(steps, MARKERS[0])
    return dict(zip(steps, MARKERS, strict=False))


def step_sizes(steps: Sequence[int]) -> dict[int, float]:
    """Give each checkpoint a marker area in points²; it grows where one marker serves them all."""
    if len(steps) <= len(MARKERS):
        return dict.fromkeys(steps, 22.0)
    return {step: 6.0 + 34.0 * i / (len(steps) - 1) for i, step in enumerate(steps)}


def run_title(run: str, method: str) -> str:
    """Name a run on a figure: the method's usual spelling where the run is called after it."""
    return METHOD_NAMES.get(method, run) if run == method else run
