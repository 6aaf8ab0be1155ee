"""Every kind of figure by its name, as the command line asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from matplotlib.figure import Figure

from wda.figures.heatmaps import heatmap_grid
from wda.figures.material import Material
from wda.figures.profiles import profile_grid
from wda.figures.scatters import scatter_grid
from wda.figures.trajectories import trajectory_grid

Figures = Iterator[tuple[str, Figure]]


def _scatter(material: Material) -> Figures:
    yield "scatter", scatter_grid(material.table, material.statistics)


def _profile(material: Material) -> Figures:
    yield "profile", profile_grid(material.table)


def _trajectory(material: Material) -> Figures:
    yield "trajectory", trajectory_grid(material.table)


def _heatmap(material: Material) -> Figures:
    for quantity in ("delta_m", "delta_d"):
        yield f"heatmap_{quantity}", heatmap_grid(material.table, quantity)
        across = heatmap_grid(material.table, quantity, across="matrix")
        yield f"heatmap_matrices_{quantity}", across


# Kind → what makes its figures, each with the name of its file.
KINDS: dict[str, Callable[[Material], Figures]] = {
    "scatter": _scatter,
    "profile": _profile,
    "trajectory": _trajectory,
    "heatmap": _heatmap,
}
