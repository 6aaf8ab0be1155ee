"""Table and fits → pictures. Whatever is drawn was computed before and stands in the tables.

Each kind of figure has a function that draws on one Axes and returns it, and one that makes the
whole figure with a panel per run and matrix. :data:`KINDS` makes all figures of a kind from what a
comparison wrote, as ``wda figures --kind`` does.
"""

from wda.figures.distributions import vectors, vectors_grid
from wda.figures.heatmaps import heatmap, heatmap_grid
from wda.figures.kinds import KINDS, draw
from wda.figures.material import Material
from wda.figures.nulls import null, null_grid
from wda.figures.panels import X_LABEL, Y_LABEL, save
from wda.figures.profiles import effective_rank_grid, profile, profile_grid
from wda.figures.repetitions import repetitions
from wda.figures.scatters import scatter, scatter_grid
from wda.figures.spectra import spectrum, spectrum_grid
from wda.figures.trajectories import trajectory, trajectory_grid

__all__ = [
    "KINDS",
    "X_LABEL",
    "Y_LABEL",
    "Material",
    "draw",
    "effective_rank_grid",
    "heatmap",
    "heatmap_grid",
    "null",
    "null_grid",
    "profile",
    "profile_grid",
    "repetitions",
    "save",
    "scatter",
    "scatter_grid",
    "spectrum",
    "spectrum_grid",
    "trajectory",
    "trajectory_grid",
    "vectors",
    "vectors_grid",
]
