"""Draws the pictures of docs/figures.md from a comparison made with --vectors and --spectra.

Run it from the top of the repository: python docs/make_figures.py figures/demo
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from wda import figures, style
from wda.comparison import reopen

PICTURES = Path(__file__).parent / "figures"

# What the page shows of each kind.
SHOWN = {
    "scatter": "scatter",
    "profile": "profile",
    "trajectory": "trajectory",
    "heatmap": "heatmap_delta_m",
    "vectors": "vectors_magnitude",
    "spectrum": "spectrum",
    "null": "null",
}
# Small enough for a page of text, in bytes too.
_DPI = 130
_COLOURS = 64


def draw(folder: Path, out: Path) -> None:
    """Write a small picture of each kind of figure."""
    material = reopen(folder).material
    for kind, name in SHOWN.items():
        _save(dict(figures.KINDS[kind](material))[name], out / f"kind_{kind}.png")
    if material.draws is not None:
        with_null = figures.scatter_grid(
            material.table, material.statistics, draws=material.draws, floor=True
        )
        _save(with_null, out / "kind_scatter_null.png")


def _save(figure: Figure, file: Path) -> None:
    with style.paper_style():
        figure.savefig(file, dpi=_DPI)
    plt.close(figure)
    with Image.open(file) as picture:
        small = picture.convert("RGB").quantize(_COLOURS)
    small.save(file, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), PICTURES)
