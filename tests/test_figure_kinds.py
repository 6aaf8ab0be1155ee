"""Every kind of figure, through its artists: what is drawn is what stands in the table."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from made_tables import (
    made_draws,
    made_material,
    made_spectra,
    made_statistics,
    made_table,
    made_vectors,
    untidy,
)
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgb
from scipy import stats

import wda
from wda import figures, style
from wda.draws import write_draws
from wda.errors import TableError
from wda.figures.fits import fits_of
from wda.table import write_table

LONG = (
    "meta-llama/Llama-3.1-70B-Instruct-fft-commonsense-170k-lr1e-5",
    "organisation_with_long_name/lora-r16-alpha32-dropout0.05-v0.3",
    "x" * 300,
)
# What figures have to bear.
TABLES: dict[str, Callable[[], pd.DataFrame]] = {
    "as the demo's": made_table,
    "80 layers, 40 steps": lambda: made_table(80, 40, ("lora",), ("query",)),
    "long names": lambda: made_table(
        2, 2, LONG, ("query", "value"), methods=("ft", "lora", "dora")
    ),
    "one point": lambda: made_table(1, 1, ("lora",), ("query",)),
    "five runs": lambda: made_table(3, 2, ("ft", "lora", "dora", "vera", "qlora"), ("query",)),
    "seven matrices": lambda: made_table(
        2, 2, ("lora",), ("query", "key", "value", "output", "gate", "up", "down")
    ),
    "floors": lambda: made_table(runs=("lora",), floor=0.15),
}


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def of(table: pd.DataFrame, run: str, matrix: str = "query") -> pd.DataFrame:
    return table[(table["run"] == run) & (table["matrix"] == matrix)]


@pytest.mark.parametrize("kind", figures.KINDS)
@pytest.mark.parametrize("table", TABLES)
def test_words_neither_overlap_nor_are_cut(kind: str, table: str) -> None:
    for name, figure in figures.KINDS[kind](made_material(TABLES[table]())):
        assert untidy(figure) == [], name


@pytest.mark.parametrize("kind", figures.KINDS)
def test_three_runs_fit_a_narrow_page(kind: str) -> None:
    width = style.NEURIPS_PAGE
    grids = {
        "scatter": lambda m: figures.scatter_grid(m.table, m.statistics, width=width),
        "profile": lambda m: figures.profile_grid(m.table, width=width),
        "trajectory": lambda m: figures.trajectory_grid(m.table, width=width),
        "heatmap": lambda m: figures.heatmap_grid(m.table, width=width),
        "vectors": lambda m: figures.vectors_grid(m.vectors, width=width),
        "spectrum": lambda m: figures.spectrum_grid(m.values, width=width),
        "null": lambda m: figures.null_grid(m.table, m.statistics, m.draws, width=width),
    }
    figure = grids[kind](made_material(made_table()))
    assert figure.get_figwidth() <= width + 1e-9
    assert untidy(figure) == []


# --- profiles


def lines_of(ax: plt.Axes) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_xydata()) for line in ax.lines}


def test_a_profile_is_the_last_checkpoint_layer_by_layer() -> None:
    table = made_table(matrices=("query",))
    ax = figures.profile(table, "delta_d")
    lines = lines_of(ax)
    assert list(lines) == ["FT", "LoRA", "DoRA"]
    rows = of(table, "dora")
    expected = rows[rows["step"] == 700][["layer", "delta_d"]].to_numpy(float)
    assert np.array_equal(lines["DoRA"], expected)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer", "ΔD")
    earlier = lines_of(figures.profile(table, "delta_d", step=175))["DoRA"]
    assert np.array_equal(earlier[:, 1], rows[rows["step"] == 175]["delta_d"])


def test_runs_of_other_lengths_are_shown_at_their_own_end() -> None:
    table = made_table(matrices=("query",))
    table = table[(table["run"] != "lora") | (table["step"] <= 350)]
    lines = lines_of(figures.profile(table))
    assert np.array_equal(lines["LoRA"][:, 1], of(table, "lora").query("step == 350")["delta_m"])
    title = figures.profile_grid(table).axes[0].get_title()
    assert title == "query, last checkpoint"


def test_seeds_are_one_line_with_a_band() -> None:
    table = made_table(
        runs=("a", "b", "c", "dora"),
        methods=("lora", "lora", "lora", "dora"),
        seeds=(1, 2, 3, 1),
        matrices=("query",),
    )
    ax = figures.profile(table)
    lines = lines_of(ax)
    assert list(lines) == ["LoRA (3 seeds)", "DoRA"]
    last = table[(table["step"] == 700) & (table["method"] == "lora")]
    over = last.groupby("layer")["delta_m"]
    assert np.allclose(lines["LoRA (3 seeds)"][:, 1], over.mean())
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    for layer, rows in over:
        heights = corners[corners[:, 0] == layer, 1]
        assert heights.min() == pytest.approx(rows.min())
        assert heights.max() == pytest.approx(rows.max())


@pytest.mark.parametrize("seeds", [(1, 1), (1, None)])
def test_runs_that_differ_in_more_than_a_known_seed_stay_apart(
    seeds: tuple[int | None, ...],
) -> None:
    table = made_table(runs=("a", "b"), methods=("lora", "lora"), seeds=seeds, matrices=("query",))
    assert list(lines_of(figures.profile(table))) == ["a", "b"]
    table["seed"] = table["run"].map({"a": 1, "b": 2}).astype("Int64")
    table["rank"] = table["run"].map({"a": 8, "b": 16}).astype("Int64")
    assert list(lines_of(figures.profile(table))) == ["a", "b"]


def test_several_rows_of_a_layer_are_their_mean() -> None:
    table = made_table(runs=("lora",), matrices=("query",), steps=1)
    decoder = table.assign(module="decoder." + table["module"], delta_m=3 * table["delta_m"])
    both = pd.concat([table, decoder], ignore_index=True)
    (line,) = lines_of(figures.profile(both)).values()
    assert np.allclose(line[:, 1], 2 * table["delta_m"])


def test_lines_close_to_each_other_have_names_apart() -> None:
    table = made_table(matrices=("query",), runs=("one", "two", "three", "four"))
    table["delta_m"] = 1.0 + 1e-3 * table["run"].map({"one": 0, "two": 1, "three": 2, "four": 3})
    table.loc[table["layer"] == 0, "delta_m"] = 2.0  # so that the ends share a thousandth of it
    ax = figures.profile(table)
    assert untidy(ax.figure) == []
    names = {text.get_text(): text.get_window_extent().y0 for text in ax.texts}
    assert sorted(names, key=lambda name: names[name]) == ["one", "two", "three", "four"]


@pytest.mark.parametrize("runs", [("lora", "dora"), ("ft", "lora", "dora")])
def test_a_name_stands_at_the_end_of_its_line(runs: tuple[str, ...]) -> None:
    table = made_table(runs=runs, matrices=("query",))
    table.loc[table["layer"] == 5, "delta_m"] *= table["run"].map({"ft": 1, "lora": 1, "dora": 9})
    ax = figures.profile(table)
    ax.figure.draw_without_rendering()
    ends = {line.get_label(): ax.transData.transform(line.get_xydata()[-1])[1] for line in ax.lines}
    for text in ax.texts:
        box = text.get_window_extent()
        assert (box.y0 + box.y1) / 2 == pytest.approx(ends[text.get_text()], abs=4)
        line = next(line for line in ax.lines if line.get_label() == text.get_text())
        assert text.get_color() == line.get_color()


def test_many_lines_have_a_legend() -> None:
    runs = tuple(f"run-{i}" for i in range(9))
    ax = figures.profile(made_table(runs=runs, matrices=("query",)))
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(runs)
    looks = {(line.get_color(), line.get_marker(), str(line.get_linestyle())) for line in ax.lines}
    assert len(looks) == 9


def test_sizes_far_apart_are_shown_by_their_logarithm() -> None:
    table = made_table(matrices=("query",))
    assert figures.profile(table).get_yscale() == "log"
    assert figures.profile(table[table["run"] != "ft"]).get_yscale() == "linear"


def test_one_axes_shows_one_matrix() -> None:
    with pytest.raises(TableError, match=r"profile: one Axes shows one matrix, .*query, value"):
        figures.profile(made_table())
    with pytest.raises(TableError, match="step: no checkpoint 176 in the table; there are 175, 35"):
        figures.profile(made_table(matrices=("query",)), step=176)


# --- trajectories


def test_a_path_goes_through_its_checkpoints_in_order() -> None:
    table = made_table(runs=("lora",), matrices=("query",))
    shuffled = table.sample(frac=1, random_state=0)
    ax = figures.trajectory(shuffled)
    paths = {line.get_xydata().tobytes() for line in ax.lines}
    expected = {
        rows.sort_values("step")[["delta_d", "delta_m"]].to_numpy(float).tobytes()
        for _, rows in table.groupby("layer")
    }
    assert paths == expected
    arrows = [text for text in ax.texts if getattr(text, "arrow_patch", None) is not None]
    assert len(arrows) == 6
    for arrow in arrows:  # both changes grow in this table, so all point up and to the right
        assert (np.array(arrow.xy) > np.array(arrow.xyann)).all()
    ends = {text.get_text(): text.xy for text in ax.texts if text.get_text()}
    last = table[table["step"] == 700].set_index("layer")
    assert set(ends) == set("012345")
    assert all(
        tuple(xy) == tuple(last.loc[int(layer), ["delta_d", "delta_m"]])
        for layer, xy in ends.items()
    )


def test_two_modules_of_one_layer_are_two_paths() -> None:
    table = made_table(runs=("lora",), matrices=("query",))
    decoder = table.assign(module="decoder." + table["module"], delta_m=3 * table["delta_m"])
    assert len(figures.trajectory(pd.concat([table, decoder])).lines) == 12


def test_paths_of_several_runs_are_told_apart() -> None:
    table = made_table(runs=("lora", "dora"), matrices=("query",))
    ax = figures.trajectory(table)
    assert len({(line.get_color(), str(line.get_linestyle())) for line in ax.lines}) == 2
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["LoRA", "DoRA"]


# --- heat maps


def mesh_of(ax: plt.Axes) -> np.ma.MaskedArray:
    (mesh,) = [c for c in ax.collections if isinstance(c, QuadMesh)]
    return mesh.get_array()


def test_cells_are_the_tables_numbers_layers_upward() -> None:
    table = made_table(runs=("lora",), matrices=("query",))
    ax = figures.heatmap(table.sample(frac=1, random_state=0), "delta_d")
    expected = table.pivot(index="layer", columns="step", values="delta_d").to_numpy()
    assert np.allclose(mesh_of(ax), expected)
    assert ax.get_ylim() == (0, 6)  # layer 0 is at the bottom
    assert [t.get_text() for t in ax.get_xticklabels()] == ["175", "350", "525", "700"]
    assert [t.get_text() for t in ax.get_yticklabels()] == list("012345")


def test_matrices_beside_each_other_are_those_of_the_last_step() -> None:
    table = made_table(runs=("lora",))
    ax = figures.heatmap(table, across="matrix")
    last = table[table["step"] == 700].pivot(index="layer", columns="matrix", values="delta_m")
    assert np.allclose(mesh_of(ax), last.to_numpy())
    panel = figures.heatmap_grid(table, across="matrix").axes[0]
    assert np.allclose(mesh_of(panel), last.to_numpy())
    assert [t.get_text() for t in ax.get_xticklabels()] == ["query", "value"]


def test_every_run_has_its_own_colours() -> None:
    figure = figures.heatmap_grid(made_table())
    ends = [c.get_clim() for ax in figure.axes for c in ax.collections if c.get_array() is not None]
    assert len(ends) >= 6
    panels = [ax for ax in figure.axes if ax.get_title() in ("FT", "LoRA", "DoRA")]
    assert mesh_of(panels[0]).max() < 0.1 * mesh_of(panels[1]).max()


def test_cells_below_the_floor_are_crossed_out_and_empty_ones_white() -> None:
    table = made_table(runs=("lora",), matrices=("query",))
    table["below_floor"] = (table["layer"] == 2) & (table["step"] == 350)
    table.loc[(table["layer"] == 4) & (table["step"] == 525), "delta_m"] = np.nan
    ax = figures.heatmap(table)
    assert sorted(zip(*np.nonzero(np.ma.getmaskarray(mesh_of(ax))), strict=True)) == [
        (2, 1),
        (4, 2),
    ]
    (patch,) = ax.patches
    assert patch.get_xy() == (1, 2)
    crosses = [c for c in ax.collections if not isinstance(c, QuadMesh)]
    assert np.allclose(crosses[0].get_offsets(), [[1.5, 2.5]])


def test_one_run_and_one_matrix_on_a_heat_map() -> None:
    with pytest.raises(TableError, match="heatmap: one Axes shows one run"):
        figures.heatmap(made_table(matrices=("query",)))
    with pytest.raises(TableError, match="heatmap: one Axes shows one matrix"):
        figures.heatmap(made_table(runs=("lora",)))


# --- vectors, spectra


def test_boxes_are_the_quantiles_of_the_vectors() -> None:
    table = made_table(runs=("lora",), matrices=("query",), layers=3)
    frame = made_vectors(table)
    ax = figures.vectors(frame)
    last = frame[frame["step"] == 700]
    for layer, rows in last.groupby("layer"):
        low, high = np.quantile(rows["magnitude_change"], [0.25, 0.75])
        (box,) = [p for p in ax.patches if abs(np.mean(p.get_path().vertices[:4, 0]) - layer) < 0.1]
        corners = box.get_path().vertices[:4, 1]
        assert corners.min() == pytest.approx(low)
        assert corners.max() == pytest.approx(high)
        # The whiskers end at vectors that lie inside the 5 % and 95 % quantiles.
        inside = rows["magnitude_change"].between(
            *np.quantile(rows["magnitude_change"], [0.05, 0.95])
        )
        ends = rows["magnitude_change"][inside]
        drawn = [
            y
            for line in ax.lines
            if np.allclose(line.get_xdata(), layer)
            for y in np.asarray(line.get_ydata())
        ]
        assert min(drawn) == pytest.approx(ends.min())
        assert max(drawn) == pytest.approx(ends.max())


def test_spectra_are_medians_between_the_least_and_the_largest_layer() -> None:
    values, _ = made_spectra(made_table(runs=("lora",), matrices=("query",), steps=1))
    ax = figures.spectrum(values)
    lines = lines_of(ax)
    assert list(lines) == ["W0", "Wt", "ΔW"]
    update = values[values["of"] == "update"].groupby("index")["singular_value"]
    assert np.array_equal(lines["ΔW"][:, 0], np.arange(1, 9))
    assert np.allclose(lines["ΔW"][:, 1], update.median())
    corners = ax.collections[-1].get_paths()[0].vertices
    assert corners[corners[:, 0] == 3, 1].max() == pytest.approx(update.max()[2])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_effective_ranks_are_the_summarys() -> None:
    _, summary = made_spectra(made_table())
    ax = figures.effective_rank_grid(summary).axes[0]
    rows = summary[(summary["run"] == "dora") & (summary["matrix"] == "query")]
    last = rows[rows["step"] == 700]
    assert np.allclose(lines_of(ax)["DoRA"][:, 1], last["effective_rank"])


# --- nulls, and what is drawn beside a scatter


def test_fits_of_draws_are_scipys() -> None:
    table = made_table(runs=("lora",), matrices=("query",))
    draws = made_draws(table, 20)
    draws.delta_d[3, 5] = np.nan
    known = np.arange(len(table)) != 3
    draws.delta_d[known, 7] = 1.0
    r, slope, intercept = fits_of(draws)
    for i in range(20):
        if i == 7:
            assert np.isnan(r[i])
            continue
        line = stats.linregress(draws.delta_d[known, i], draws.delta_m[known, i])
        assert (r[i], slope[i], intercept[i]) == pytest.approx(
            (line.rvalue, line.slope, line.intercept), rel=1e-9
        )


def test_the_measured_r_stands_among_the_random_ones() -> None:
    table = made_table(runs=("dora",), matrices=("query",))
    statistics, draws = made_statistics(table), made_draws(table)
    ax = figures.null(table, statistics, draws)
    assert sum(bar.get_height() for bar in ax.patches) == len(draws)
    edges = [bar.get_x() for bar in ax.patches]
    assert min(edges) == pytest.approx(fits_of(draws)[0].min())
    fit = statistics.iloc[0]
    band, middle, line = ax.collections
    assert middle.get_segments()[0][0, 0] == np.median(fits_of(draws)[0])
    assert line.get_segments()[0][0, 0] == fit["pearson_r"]
    corners = band.get_paths()[0].vertices[:, 0]
    assert (corners.min(), corners.max()) == (0.83, 0.95)
    (text,) = ax.texts
    r = f"{fit['pearson_r']:+.2f}".replace("-", "−")
    assert text.get_text() == f"measured r = {r}\nrank 8: [+0.83, +0.95]\np = 0.0042"


def test_a_null_without_band_or_p_is_still_drawn() -> None:
    table = made_table(runs=("dora",), matrices=("query",))
    bare = made_statistics(table)[["run", "matrix", "pearson_r", "slope", "intercept", "n"]]
    ax = figures.null(table, bare, made_draws(table))
    assert len(ax.collections) == 2  # the middle of the draws, and the measured r
    assert "\n" not in ax.texts[0].get_text()


def test_scatter_tells_intervals_and_nulls_where_the_statistics_have_them() -> None:
    table = made_table(runs=("lora",), matrices=("query",))
    statistics = made_statistics(table)
    fit = statistics.iloc[0]
    (text,) = figures.scatter(table, statistics).texts
    assert text.get_text().splitlines() == [
        f"r = {fit['pearson_r']:+.2f} [{fit['pearson_r_low']:+.2f}, +1.00]",
        f"slope = {fit['slope']:+.3g}",
        "random: [+0.83, +0.95]",
    ]


def test_the_band_of_the_line_turns_about_the_middle_of_the_points() -> None:
    table = made_table(runs=("lora",), matrices=("query",))
    statistics = made_statistics(table)
    fit = statistics.iloc[0]
    ax = figures.scatter(table, statistics, interval=True)
    corners = ax.collections[-1].get_paths()[0].vertices
    x, y = table["delta_d"].mean(), table["delta_m"].mean()
    assert np.allclose(corners[np.isclose(corners[:, 0], x), 1], y)
    right = table["delta_d"].max()
    heights = corners[np.isclose(corners[:, 0], right), 1]
    ends = y + np.array([fit["slope_low"], fit["slope_high"]]) * (right - x)
    assert (heights.min(), heights.max()) == pytest.approx(tuple(ends))
    with pytest.raises(TableError, match="interval: the statistics have no slope_low"):
        figures.scatter(table, statistics.drop(columns="slope_low"), interval=True)
    without = statistics.assign(slope_low=np.nan)  # too few layers for an interval
    assert len(figures.scatter(table, without, interval=True).collections) == 1


def test_the_null_band_holds_95_percent_of_the_random_lines() -> None:
    table = made_table(runs=("lora",), matrices=("query",))
    draws = made_draws(table)
    ax = figures.scatter(table, made_statistics(table), draws=draws)
    corners = ax.collections[-1].get_paths()[0].vertices
    x = draws.delta_d.max()
    lines = [stats.linregress(d, m) for d, m in zip(draws.delta_d.T, draws.delta_m.T, strict=True)]
    low, high = np.quantile([line.intercept + line.slope * x for line in lines], [0.025, 0.975])
    heights = corners[np.isclose(corners[:, 0], x), 1]
    assert (heights.min(), heights.max()) == pytest.approx((low, high))


def test_panels_find_their_own_draws() -> None:
    table = made_table()
    statistics, draws = made_statistics(table), made_draws(table)
    figure = figures.scatter_grid(table, statistics, draws=draws)
    alone = table["run"].eq("dora") & table["matrix"].eq("value")
    mask = alone.to_numpy(bool)
    single = figures.scatter(table[alone], statistics, draws=draws.of(mask))
    assert np.allclose(
        figure.axes[5].collections[-1].get_paths()[0].vertices,
        single.collections[-1].get_paths()[0].vertices,
    )
    with pytest.raises(TableError, match="draws: 144 rows, and the table has 24; select the same"):
        figures.scatter(table[alone], statistics, draws=draws)


def test_the_floor_is_three_times_the_largest() -> None:
    table = made_table(runs=("lora",), matrices=("query",), floor=0.15)
    ax = figures.scatter(table, made_statistics(table), floor=True)
    down, across = ax.lines[0], ax.lines[1]
    assert down.get_xdata()[0] == pytest.approx(3 * table["floor_delta_d"].max())
    assert across.get_ydata()[0] == pytest.approx(3 * table["floor_delta_m"].max())
    bare = table.assign(floor_delta_d=np.nan, floor_delta_m=np.nan)
    with pytest.raises(TableError, match="floor: the table tells no floors"):
        figures.scatter(bare, made_statistics(table), floor=True)


def grey_points(ax: plt.Axes) -> np.ndarray:
    grey = to_rgb(style.FLOORED_COLOUR)
    found = []
    for points in ax.collections:
        offsets, colours = np.asarray(points.get_offsets()), points.get_facecolors()[:, :3]
        colours = np.broadcast_to(colours, (len(offsets), 3))
        found.append(offsets[np.isclose(colours, grey).all(axis=1)])
    return np.concatenate(found)


@pytest.mark.parametrize("kind", ["scatter", "trajectory"])
def test_rows_below_the_floor_are_grey(kind: str) -> None:
    table = made_table(runs=("lora",), matrices=("query",), floor=0.15)
    floored = table[table["below_floor"]]
    assert 0 < len(floored) < len(table)
    ax = (
        figures.scatter(table, made_statistics(table))
        if kind == "scatter"
        else figures.trajectory(table)
    )
    expected = floored[["delta_d", "delta_m"]].to_numpy(float)
    assert sorted(map(tuple, grey_points(ax))) == sorted(map(tuple, expected))
    assert ax.get_legend().get_texts()[-1].get_text() == "below 3 × floor"


def test_layers_below_the_floor_are_grey_in_a_profile() -> None:
    table = made_table(runs=("lora", "dora"), matrices=("query",))
    table["below_floor"] = (table["run"] == "lora") & (table["layer"] == 2)
    ax = figures.profile(table)
    (point,) = grey_points(ax)
    assert point[0] == 2
    assert 2 not in next(line for line in ax.lines if line.get_label() == "LoRA").get_markevery()


# --- readers without colour, bad input, files


@pytest.mark.parametrize("count", [2, 3, 7])
def test_runs_are_told_apart_without_colour(count: int) -> None:
    looks = {(style.run_marker(i), str(style.run_line(i))) for i in range(count)}
    assert len(looks) == count


def test_the_first_three_colours_differ_in_grey_and_layers_grow_lighter() -> None:
    def grey(colour: object) -> float:
        return float(np.dot(to_rgb(colour), [0.299, 0.587, 0.114]))

    first = sorted(grey(colour) for colour in style.RUN_COLOURS[:3])
    assert np.diff(first).min() > 0.2
    layers = [grey(c[:3]) for c in style.layer_colours(range(12)).values()]
    assert (np.diff(layers) > 0.01).all()


def test_several_runs_on_one_scatter_have_markers_of_their_own() -> None:
    table = made_table(matrices=("query",))
    ax = figures.scatter(table, made_statistics(table))
    outlines = {}
    for path, xy in zip(
        ax.collections[0].get_paths(), ax.collections[0].get_offsets(), strict=True
    ):
        run = table.iloc[int(np.abs(table["delta_d"] - xy[0]).argmin())]["run"]
        outlines.setdefault(run, set()).add(path.vertices.tobytes())
    assert all(len(shapes) == 1 for shapes in outlines.values())
    assert len(set.union(*outlines.values())) == 3


def test_rows_without_numbers_are_left_out_or_said() -> None:
    table = made_table(runs=("ft", "lora"))
    table.loc[(table["run"] == "ft") & (table["matrix"] == "query"), "delta_d"] = np.nan
    table.loc[(table["run"] == "lora") & (table["layer"] == 1), "delta_m"] = np.inf
    material = made_material(table)
    for kind in ("scatter", "trajectory", "heatmap", "profile"):
        for _, figure in figures.KINDS[kind](material):
            assert untidy(figure) == []
    figure = figures.scatter_grid(table, made_statistics(table))
    assert "no finite values" in figure.axes[0].texts[0].get_text()
    assert len(figures.trajectory_grid(table).axes[1].lines) == 5


@pytest.mark.parametrize("kind", ["scatter", "profile", "trajectory", "heatmap", "null"])
def test_bad_tables_are_refused(kind: str) -> None:
    good = made_table(runs=("lora",), matrices=("query",))
    material = made_material(good)

    def draw(table: pd.DataFrame) -> None:
        list(figures.KINDS[kind](replace(material, table=table)))

    with pytest.raises(TableError, match="columns missing: delta_d"):
        draw(good.drop(columns="delta_d"))
    with pytest.raises(TableError, match="has no rows"):
        draw(good.head(0))
    with pytest.raises(TableError, match=f"{kind}: no row has a finite .*delta_m"):
        draw(good.assign(delta_m=np.nan))
    mixed = good.assign(per=["input", "output"] * (len(good) // 2))
    with pytest.raises(TableError, match=f"{kind}: the table mixes per input, output"):
        draw(mixed)


@pytest.mark.parametrize("kind", ["profile", "heatmap"])
def test_without_layers_there_is_nothing_to_draw_by_layer(kind: str) -> None:
    table = made_table(runs=("lora",), matrices=("query",)).assign(layer=pd.NA)
    with pytest.raises(TableError, match=f"{kind}: no row with a finite delta_m lies in"):
        list(figures.KINDS[kind](figures.Material(table, made_statistics(table))))


@pytest.mark.parametrize(
    ("kind", "file"),
    [("vectors", "vectors.parquet"), ("spectrum", "spectra.parquet"), ("null", "nulls.parquet")],
)
def test_a_kind_without_its_material_says_what_is_missing(kind: str, file: str) -> None:
    table = made_table()
    with pytest.raises(TableError, match=f"{kind}: is drawn from {file}, .* beside the table"):
        list(figures.KINDS[kind](figures.Material(table, made_statistics(table))))


def test_material_is_what_lies_in_the_folder(tmp_path: Path) -> None:
    table = made_table(2, 1, ("lora",), ("query",))
    write_table(table, tmp_path)
    bare = wda.reopen(tmp_path).material
    assert (bare.draws, bare.vectors, bare.values, bare.summary) == (None,) * 4
    material = made_material(table)
    write_draws(material.draws, table, tmp_path)
    material.vectors.to_parquet(tmp_path / "vectors.parquet")
    material.values.to_parquet(tmp_path / "spectra.parquet")
    material.summary.to_csv(tmp_path / "spectra.csv", index=False)
    read = wda.reopen(tmp_path).material
    assert np.array_equal(read.draws.delta_m, material.draws.delta_m)
    names = figures.draw(read, figures.KINDS, tmp_path)
    assert {"scatter", "vectors_magnitude", "effective_rank", "null"} <= set(names)
    for name in names:
        assert (tmp_path / f"{name}.pdf").stat().st_size > 5000
    (tmp_path / "vectors.parquet").write_text("nonsense")
    with pytest.raises(TableError, match=r"vectors\.parquet: cannot be read: .* delete it"):
        wda.reopen(tmp_path)


def test_the_page_shows_every_kind_as_it_is_drawn(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    page = (root / "docs" / "figures.md").read_text()
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == list(figures.KINDS)
    pictures = re.findall(r"\((figures/\w+\.png)\)", page)
    assert max((root / "docs" / picture).stat().st_size for picture in pictures) < 60_000
    table = made_table(2, 2, ("lora",), ("query",))
    material = made_material(table)
    write_table(table, tmp_path)
    write_draws(material.draws, table, tmp_path)
    material.vectors.to_parquet(tmp_path / "vectors.parquet")
    material.values.to_parquet(tmp_path / "spectra.parquet")
    material.summary.to_csv(tmp_path / "spectra.csv", index=False)
    runpy.run_path(str(root / "docs" / "make_figures.py"))["draw"](tmp_path, tmp_path)
    assert {f"figures/{file.name}" for file in tmp_path.glob("*.png")} == set(pictures)
