"""Figures as pictures, against those that were looked at and found good.

They are without words, which each version of FreeType places a little elsewhere, and without the
layout and the keys, which depend on them; words are tested in ``test_figure_kinds.py``. After a
change that is meant, draw them anew with ``python tests/test_figure_pictures.py`` and look at each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pytest
from made_tables import made_material, made_table
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from wda import figures, style

FOLDER = Path(__file__).parent / "fixtures" / "figures"
NAMES = (
    *("scatter", "profile", "trajectory", "heatmap_delta_m", "heatmap_matrices_delta_m"),
    *("vectors_magnitude", "spectrum", "effective_rank", "null"),
)
_DPI = 60

# Root of the mean squared difference of the pixels, 0 to 1. Another colour of a line gives 0.01.
_TOLERANCE = 0.004


def drawn() -> Iterator[tuple[str, Figure]]:
    table = made_table(4, 3, ("lora", "dora"), ("query",), floor=0.12)
    for kind in figures.KINDS:
        for name, figure in figures.KINDS[kind](made_material(table)):
            if name in NAMES:
                yield name, figure


def pixels(figure: Figure, file: Path) -> np.ndarray:
    figure.set_layout_engine("none")
    for legend in figure.legends:
        legend.remove()
    with style.paper_style(), patch.object(Text, "draw", lambda *_: None):
        figure.savefig(file, dpi=_DPI, metadata={"Software": None})
    return imread(file)[..., :3]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("pictures")
    found = {name: pixels(figure, folder / f"{name}.png") for name, figure in drawn()}
    plt.close("all")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_figures_look_as_they_did(name: str, pictures: dict[str, np.ndarray]) -> None:
    expected = imread(FOLDER / f"{name}.png")[..., :3]
    assert pictures[name].shape == expected.shape
    assert np.sqrt(np.mean((pictures[name] - expected) ** 2)) < _TOLERANCE


if __name__ == "__main__":
    for name, figure in drawn():
        pixels(figure, FOLDER / f"{name}.png")
