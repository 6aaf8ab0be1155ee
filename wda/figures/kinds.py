"""Every kind of figure by its name, as the command line asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from matplotlib.figure import Figure

from wda.errors import TableError
from wda.figures.distributions import Change, vectors_grid
from wda.figures.heatmaps import heatmap_grid
from wda.figures.material import Material
from wda.figures.nulls import null_grid
from wda.figures.panels import save
from wda.figures.profiles import effective_rank_grid, profile_grid
from wda.figures.scatters import scatter_grid
from wda.figures.spectra import spectrum_grid
from wda.figures.trajectories import trajectory_grid

Figures = Iterator[tuple[str, Figure]]

Part = TypeVar("Part")


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


def _vectors(material: Material) -> Figures:
    frame = _given(material.vectors, "vectors", "vectors.parquet, which --vectors writes")
    changes: tuple[Change, ...] = ("magnitude_change", "direction_change")
    methods = _methods(material)
    for change in changes:
        yield f"vectors_{change.split('_')[0]}", vectors_grid(frame, change, methods=methods)


def _spectrum(material: Material) -> Figures:
    values = _given(material.values, "spectrum", "spectra.parquet, which --spectra writes")
    summary = _given(material.summary, "spectrum", "spectra.csv, which --spectra writes")
    yield "spectrum", spectrum_grid(values, methods=_methods(material))
    yield "effective_rank", effective_rank_grid(summary)


def _null(material: Material) -> Figures:
    draws = _given(material.draws, "null", "nulls.parquet, the random updates of wda compare")
    yield "null", null_grid(material.table, material.statistics, draws)


def _given(part: Part | None, kind: str, written: str) -> Part:
    """Give what a kind is drawn from.

    Raises
    ------
    TableError
        When it was not given.
    """
    if part is None:
        raise TableError(
            f"{kind}: is drawn from {written}, and none lies beside the table; compare again, or "
            "leave this kind out"
        )
    return part


def _methods(material: Material) -> dict[str, str]:
    return dict(zip(material.table["run"], material.table["method"], strict=True))


# Kind → what makes its figures, each with the name of its file.
KINDS: dict[str, Callable[[Material], Figures]] = {
    "scatter": _scatter,
    "profile": _profile,
    "trajectory": _trajectory,
    "heatmap": _heatmap,
    "vectors": _vectors,
    "spectrum": _spectrum,
    "null": _null,
}


def draw(material: Material, kinds: Iterable[str], folder: Path) -> list[str]:
    """Draw all figures of some kinds into a folder, as PNG and PDF.

    Parameters
    ----------
    material : Material
        What they are drawn from.
    kinds : iterable of str
        Names in :data:`KINDS`.
    folder : Path
        Must exist.

    Returns
    -------
    list of str
        Names of the figures, without their endings.

    Raises
    ------
    TableError
        When what a kind is drawn from is not there.
    """
    written = []
    for kind in kinds:
        for name, figure in KINDS[kind](material):
            save(figure, folder, name)
            written.append(name)
    return written
