"""Saves pictures that are small enough for a page of text, in bytes too."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from wda import style

_DPI = 130
_COLOURS = 64


def save_small(figure: Figure, file: Path) -> None:
    """Write a figure as a PNG of few colours, and close it."""
    with style.paper_style():
        figure.savefig(file, dpi=_DPI)
    plt.close(figure)
    with Image.open(file) as picture:
        small = picture.convert("RGB").quantize(_COLOURS)
    small.save(file, optimize=True)
