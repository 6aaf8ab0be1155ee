"""Differences of two runs: which points they are of, and what they are."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from clouds import Population, table_of_clouds
from scipy import stats

from wda.errors import TableError
from wda.statistics import COMPARISON_COLUMNS, compare_methods

CLOUD = Population(of_layers=0.25, of_runs=0.0, of_points=0.12, growth=0.25)


def two_runs(layers: int = 8, steps: int = 4) -> pd.DataFrame:
    """LoRA and DoRA, at steps of which the last three of four are the same."""
    random = np.random.default_rng(0)
    population = Population(**{**vars(CLOUD), "steps": steps})
    clouds = {
        (method, method, matrix): population.draw(layers, random)
        for method in ("lora", "dora")
        for matrix in ("query", "value")
    }
    table = table_of_clouds(clouds)
    table["step"] += 100 * (table["run"] == "dora").astype(int)
    # DoRA's updates are half as large again: its first is LoRA's one and a half.
    table["update_norm"] = table["step"].astype(float) * np.where(table["run"] == "dora", 1.5, 1.0)
    return table


def only(comparisons: pd.DataFrame, matrix: str = "query", matched: str = "all") -> pd.Series:
    rows = comparisons[(comparisons["matrix"] == matrix) & (comparisons["matched"] == matched)]
    assert len(rows) == 1
    return rows.iloc[0]


def r_of(rows: pd.DataFrame) -> float:
    return float(stats.pearsonr(rows["delta_d"], rows["delta_m"]).statistic)


def slope_of(rows: pd.DataFrame) -> float:
    return float(stats.linregress(rows["delta_d"], rows["delta_m"]).slope)


def test_every_label_is_compared_at_all_points_and_matched() -> None:
    comparisons = compare_methods(two_runs())
    assert list(comparisons.columns) == list(COMPARISON_COLUMNS)
    assert list(zip(comparisons["matrix"], comparisons["matched"], strict=True)) == [
        (matrix, matched)
        for matrix in ("query", "value", "all")
        for matched in ("all", "step", "update norm")
    ]
    assert set(comparisons["run_a"]) == {"lora"} and set(comparisons["run_b"]) == {"dora"}
    assert comparisons["note"].eq("").all()
    assert comparisons["clusters"].eq(8).all()


@pytest.mark.parametrize(
    ("matched", "a_steps", "b_steps"),
    [
        ("all", {100, 200, 300, 400}, {200, 300, 400, 500}),
        ("step", {200, 300, 400}, {200, 300, 400}),
        ("update norm", {300, 400}, {200}),  # from 300, which DoRA begins at, to 400, LoRA's last
    ],
)
def test_differences_are_of_the_points_that_match(
    matched: str, a_steps: set[int], b_steps: set[int]
) -> None:
    table = two_runs()
    row = only(compare_methods(table), matched=matched)
    query = table[table["matrix"] == "query"]
    a = query[(query["run"] == "lora") & query["step"].isin(a_steps)]
    b = query[(query["run"] == "dora") & query["step"].isin(b_steps)]
    assert (row["n_a"], row["n_b"]) == (len(a), len(b))
    assert row["r_difference"] == pytest.approx(r_of(a) - r_of(b), rel=1e-9)
    assert row["slope_difference"] == pytest.approx(slope_of(a) - slope_of(b), rel=1e-9)
    assert row["r_difference_low"] < row["r_difference"] < row["r_difference_high"]
    assert row["slope_difference_low"] < row["slope_difference"] < row["slope_difference_high"]


def test_a_run_against_itself_differs_by_nothing_for_certain() -> None:
    table = two_runs()
    lora = table[table["run"] == "lora"]
    twin = lora.assign(run="twin")
    row = only(compare_methods(pd.concat([lora, twin], ignore_index=True)))
    ends = ["r_difference_low", "r_difference", "r_difference_high"]
    assert row[ends].tolist() == pytest.approx([0, 0, 0], abs=1e-12)


def test_only_matrices_that_both_have_are_compared() -> None:
    table = two_runs()
    few = table[(table["run"] == "lora") | (table["layer"] < 6)]
    row = only(compare_methods(few))
    both = few[(few["layer"] < 6) & (few["matrix"] == "query")]
    expected = r_of(both[both["run"] == "lora"]) - r_of(both[both["run"] == "dora"])
    assert (row["n_a"], row["n_b"], row["clusters"]) == (24, 24, 6)
    assert row["r_difference"] == pytest.approx(expected, rel=1e-9)


def test_methods_of_several_runs_are_compared_as_such() -> None:
    random = np.random.default_rng(1)
    runs = [("a", "lora"), ("b", "lora"), ("c", "dora")]
    table = table_of_clouds({(run, m, "query"): CLOUD.draw(6, random) for run, m in runs})
    comparisons = compare_methods(table)
    pairs = comparisons[["run_a", "run_b"]].fillna("").drop_duplicates().to_numpy().tolist()
    assert pairs == [["a", "b"], ["a", "c"], ["b", "c"], ["", ""]]
    row = only(comparisons[comparisons["run_a"].isna()])
    assert (row["method_a"], row["method_b"], row["n_a"], row["n_b"]) == ("lora", "dora", 48, 24)
    lora, dora = (table[table["method"] == method] for method in ("lora", "dora"))
    assert row["r_difference"] == pytest.approx(r_of(lora) - r_of(dora), rel=1e-9)


@pytest.mark.parametrize(
    ("change", "matched", "note"),
    [
        ({"update_norm": np.nan}, "update norm", "‖ΔW‖ is not in the table"),
        ({"step": pd.NA}, "step", "the steps are not known"),
        ({"delta_d": 1.0}, "all", "a: ΔD is the same at all points"),
        ({"delta_m": 1.0}, "all", "ΔM of one is the same at all points"),
    ],
)
def test_notes_say_why_a_value_is_empty(change: dict[str, object], matched: str, note: str) -> None:
    row = only(compare_methods(two_runs().assign(**change)), matched=matched)
    assert row["note"] == note
    assert np.isnan(row["r_difference"])


def test_notes_say_what_does_not_meet() -> None:
    table = two_runs()
    of_dora = table["run"] == "dora"
    later = table.assign(step=table["step"] + 1000 * of_dora.astype(int))
    assert only(compare_methods(later), matched="step")["note"] == "no step in common"
    larger = table.assign(update_norm=table["update_norm"] * np.where(of_dora, 100.0, 1.0))
    row = only(compare_methods(larger), matched="update norm")
    assert row["note"] == "no matrix has the same ‖ΔW‖ in both"
    assert (row["n_a"], row["n_b"], row["clusters"]) == (0, 0, 0)
    modules = table["module"].where(~of_dora, "other." + table["module"])
    row = only(compare_methods(table.assign(module=modules)), "all")
    assert row["note"] == "no matrix in common"


def test_few_layers_have_a_difference_but_no_interval() -> None:
    row = only(compare_methods(two_runs(layers=4)))
    assert row["note"] == "4 layers in common, fewer than the 5 that an interval takes"
    assert np.isfinite(row["r_difference"]) and np.isnan(row["r_difference_low"])


def test_one_run_has_nothing_to_compare_with() -> None:
    table = two_runs()
    comparisons = compare_methods(table[table["run"] == "lora"])
    assert comparisons.empty and list(comparisons.columns) == list(COMPARISON_COLUMNS)


def test_axes_are_compared_each_by_itself_and_floored_points_left_out() -> None:
    table = two_runs()
    both = pd.concat([table, table.assign(per="input")], ignore_index=True)
    comparisons = compare_methods(both)
    assert comparisons.groupby("per").size().to_dict() == {"output": 9, "input": 9}
    floored = table.assign(below_floor=(table["step"] == 200).astype("boolean"))
    row = only(compare_methods(floored, leave_out_floored=True))
    assert (row["n_a"], row["n_b"]) == (24, 24)


def test_bad_tables_are_refused() -> None:
    table = two_runs()
    with pytest.raises(TableError, match="columns missing: delta_d"):
        compare_methods(table.drop(columns="delta_d"))
    with pytest.raises(TableError, match="no rows"):
        compare_methods(table[:0])


def test_two_r_are_no_further_apart_than_two() -> None:
    """Six layers leave an interval that the bootstrap alone would draw beyond that."""
    random = np.random.default_rng(5)
    rising = Population(between=0.9, of_layers=1.2).draw(6, random)
    falling = Population(between=-0.9, of_layers=1.2, of_points=0.6).draw(6, random)
    clouds = {("a", "lora", "query"): rising, ("b", "dora", "query"): falling}
    row = only(compare_methods(table_of_clouds(clouds)))
    assert row["r_difference_high"] == 2
    assert row["slope_difference_high"] > 2
