"""Draws the pictures of docs/figures.md from a comparison made with --vectors and --spectra.

Run it from the top of the repository: python docs/make_figures.py figures/demo
"""

from __future__ import annotations

import sys
from pathlib import Path

from small_pictures import save_small

from wda import figures
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


def draw(folder: Path, out: Path) -> None:
    """Write a small picture of each kind of figure."""
    material = reopen(folder).material
    for kind, name in SHOWN.items():
        save_small(dict(figures.KINDS[kind](material))[name], out / f"kind_{kind}.png")
    if material.draws is not None:
        with_null = figures.scatter_grid(
            material.table, material.statistics, draws=material.draws, floor=True
        )
        save_small(with_null, out / "kind_scatter_null.png")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), PICTURES)
