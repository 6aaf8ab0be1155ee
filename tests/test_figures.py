"""Pictures, through their artists: every point, every line, every word that should be there."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import nbclient
import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

import wda
from wda import figures
from wda.errors import TableError
from wda.statistics import compute_statistics
from wda.table import make_table


def made_table(
    layers: int = 6,
    steps: int = 4,
    runs: tuple[str, ...] = ("ft", "lora", "dora"),
    matrices: tuple[str, ...] = ("query",),
) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return make_table(
        {
            "run": run,
            "method": run,
            "seed": 0,
            "step": 100 * (step + 1),
            "module": f"layer.{layer}.{matrix}",
            "layer": layer,
            "matrix": matrix,
            "per": "output",
            "out_features": 3,
            "in_features": 4,
            "n_vectors": 3,
            "delta_d": 1e-3 * (step + 1 + 0.1 * layer + 0.1 * rng.random()),
            "delta_m": 1e-2 * (step + 1 - 0.2 * layer + 0.1 * rng.random()),
            "n_undirected": 0,
            "dtype": "float32",
            "base_dtype": "float32",
        }
        for run in runs
        for step in range(steps)
        for layer in range(layers)
        for matrix in matrices
    )


@pytest.fixture(autouse=True)
def close_figures() -> object:
    yield
    plt.close("all")


def points_of(ax: plt.Axes) -> np.ndarray:
    return np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections])


def test_grid_has_a_panel_per_run_with_its_points_and_line() -> None:
    table = made_table()
    statistics = compute_statistics(table)
    figure = figures.scatter_grid(table, statistics)
    assert [ax.get_title() for ax in figure.axes] == ["FT", "LoRA", "DoRA"]
    for ax, run in zip(figure.axes, ("ft", "lora", "dora"), strict=True):
        rows = table[table["run"] == run]
        assert np.allclose(points_of(ax), rows[["delta_d", "delta_m"]].to_numpy())
        fit = statistics[(statistics["run"] == run) & (statistics["matrix"] == "query")].iloc[0]
        (line,) = ax.lines
        assert np.allclose(line.get_ydata(), fit["slope"] * line.get_xdata() + fit["intercept"])
        assert np.allclose(line.get_xdata(), [rows["delta_d"].min(), rows["delta_d"].max()])
        (text,) = [t.get_text() for t in ax.texts]
        assert f"r = {fit['pearson_r']:+.2f}" in text
        assert f"slope = {fit['slope']:+.3g}" in text
    words = [t.get_text() for legend in figure.legends for t in legend.get_texts()]
    assert words == [f"layer {i}" for i in range(6)] + [f"step {100 * i}" for i in (1, 2, 3, 4)]


def test_axes_are_labelled_and_free() -> None:
    table = made_table(matrices=("query", "value"))
    table.loc[table["run"] == "ft", ["delta_m", "delta_d"]] *= 1e-3
    figure = figures.scatter_grid(table, compute_statistics(table))
    grid = np.array(figure.axes).reshape(2, 3)
    assert [ax.get_ylabel() for ax in grid[:, 0]] == ["query: ΔM", "value: ΔM"]
    assert {ax.get_xlabel() for ax in grid[1]} == {figures.X_LABEL}
    assert grid[0, 0].get_xlim()[1] < 0.1 * grid[0, 1].get_xlim()[1]


def test_a_layer_has_the_same_colour_and_a_step_the_same_marker_in_every_panel() -> None:
    table = made_table()
    figure = figures.scatter_grid(table, compute_statistics(table))
    colours = {tuple(to_hex(c) for c in ax.collections[0].get_facecolors()) for ax in figure.axes}
    assert len(colours) == 1
    assert len(set(colours.pop())) == 6
    outlines = [
        {path.vertices.tobytes() for path in ax.collections[0].get_paths()} for ax in figure.axes
    ]
    assert all(len(shapes) == 4 for shapes in outlines)
    assert outlines[0] == outlines[1] == outlines[2]


def test_scatter_returns_the_axes_it_was_given() -> None:
    table = made_table(runs=("lora",))
    _, ax = plt.subplots()
    assert figures.scatter(table, compute_statistics(table), ax=ax) is ax
    assert len(points_of(ax)) == 24
    assert len(ax.lines) == 1


def test_scatter_of_several_runs_has_a_line_and_a_colour_for_each() -> None:
    table = made_table()
    ax = wda.figures.scatter(table, compute_statistics(table))
    assert len(ax.lines) == 3
    assert len({to_hex(line.get_color()) for line in ax.lines}) == 3
    assert [t.get_text() for t in ax.get_legend().get_texts()][:3] == ["FT", "LoRA", "DoRA"]


def test_several_matrices_on_one_axes_use_the_fit_of_all() -> None:
    table = made_table(runs=("lora",), matrices=("query", "value"))
    statistics = compute_statistics(table)
    ax = figures.scatter(table, statistics)
    fit = statistics[statistics["matrix"] == "all"].iloc[0]
    assert f"r = {fit['pearson_r']:+.2f}" in ax.texts[0].get_text()


def test_many_layers_and_steps_stay_legible() -> None:
    table = made_table(layers=80, steps=40, runs=("lora",))
    figure = figures.scatter_grid(table, compute_statistics(table))
    assert figure.axes[-1].get_ylabel() == "layer"  # a colour bar
    words = [t.get_text() for legend in figure.legends for t in legend.get_texts()]
    assert words == ["step 100", "step 2100", "step 4000"]
    sizes = figure.axes[0].collections[0].get_sizes()
    assert sizes.max() > 3 * sizes.min()


def test_long_names_are_broken_over_lines() -> None:
    table = made_table(runs=("organisation-long-model-name-7b-instruct-v0.3", "lora"))
    figure = figures.scatter_grid(table, compute_statistics(table))
    figure.canvas.draw()
    first, second = (ax.title.get_window_extent() for ax in figure.axes)
    assert first.x1 < second.x0
    assert figure.axes[0].get_title().replace("\n", "") == table["run"].iloc[0]


def test_one_point_is_drawn_without_a_line() -> None:
    table = made_table(layers=1, steps=1, runs=("lora",))
    figure = figures.scatter_grid(table, compute_statistics(table))
    assert not figure.axes[0].lines
    assert "no r from n = 1" in figure.axes[0].texts[0].get_text()


def test_unknown_layers_and_steps_are_said() -> None:
    table = made_table(layers=2, steps=1, runs=("lora",))
    table["step"] = pd.NA
    table.loc[0, "layer"] = pd.NA
    figure = figures.scatter_grid(table, compute_statistics(table))
    words = [t.get_text() for legend in figure.legends for t in legend.get_texts()]
    assert words == ["outside layers", "layer 1", "step unknown"]


def test_a_run_without_a_matrix_says_so() -> None:
    table = made_table(runs=("ft", "lora"), matrices=("query", "key"))
    table = table[(table["run"] == "ft") | (table["matrix"] == "query")]
    figure = figures.scatter_grid(table, compute_statistics(table))
    assert "no such matrix" in figure.axes[3].texts[0].get_text()


def test_foreign_statistics_are_refused() -> None:
    table = made_table()
    statistics = compute_statistics(table[table["run"] == "ft"])
    with pytest.raises(TableError, match="no row for run 'lora', matrix 'query'"):
        figures.scatter_grid(table, statistics)
    with pytest.raises(TableError, match="columns missing: delta_m"):
        figures.scatter(table.drop(columns="delta_m"), statistics)


def test_saved_figures_are_the_same_bytes_for_the_same_table(tmp_path: Path) -> None:
    table = made_table()
    for name in ("one", "two"):
        figures.save(figures.scatter_grid(table, compute_statistics(table)), tmp_path, name)
    for ending in ("png", "pdf"):
        one, two = (tmp_path / f"{name}.{ending}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    assert b"/FontFile2" in (tmp_path / "one.pdf").read_bytes()  # TrueType, embedded


def test_the_users_own_style_is_left_alone() -> None:
    before = dict(plt.rcParams)
    figures.scatter_grid(made_table(), compute_statistics(made_table()))
    assert dict(plt.rcParams) == before


def test_a_notebook_shows_every_figure() -> None:
    """The first one loads the notebook's backend, which has to stay as it is for the next."""
    code = (
        "import pandas as pd, wda\n"
        "table = pd.DataFrame({'method': 'ft', 'seed': [0, 1], 'rank': 4, 'accuracy': [0.5, 0.6]})"
    )
    draw = "ax = wda.figures.repetitions(table, 'rank')"
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(text) for text in (code, draw, draw)]
    nbclient.NotebookClient(notebook, timeout=100).execute()
    for cell in notebook.cells[1:]:
        assert [list(output.data) for output in cell.outputs] == [["text/plain", "image/png"]]
