"""What a person is shown of the statistics."""

from __future__ import annotations

import json

import numpy as np
import pytest
from clouds import Population, table_of_clouds

from wda.console import show_statistics
from wda.draws import Draws
from wda.statistics import COLUMNS, compute_statistics, correlation, ends


def table(layers: int = 6) -> object:
    random = np.random.default_rng(0)
    runs = [("a[b]", "lora"), ("second", "lora")]
    return table_of_clouds({(*run, "query"): Population().draw(layers, random) for run in runs})


def test_a_person_sees_r_with_its_interval_and_the_readings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    points = table()
    random = np.random.default_rng(0)
    draws = Draws(np.full(len(points), "rank 8"), *random.random((2, len(points), 40)))
    statistics = compute_statistics(points, draws)
    show_statistics(statistics, as_json=False)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:4])) <= 120
    for _, row in statistics[statistics["matrix"] != "all"].iterrows():
        r = f"{row['pearson_r']:+.2f} [{row['pearson_r_low']:+.2f}, {row['pearson_r_high']:+.2f}]"
        band = f"{row['null_r_low']:+.2f} to {row['null_r_high']:+.2f}"
        (line,) = {
            line
            for line in printed.splitlines()
            if r in line and line.split()[-6:-3] == band.split() and f" {row['matrix']} " in line
        }
        assert f"{row['within_layer_r']:+.2f}" in line.split()
        assert row["reading"] in printed
    assert printed.splitlines()[1].startswith("a[b] ")
    assert "a[b], query: r " in printed
    assert "all runs, query: r " in printed


def test_columns_that_would_be_empty_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    show_statistics(compute_statistics(table(3).query("step == 100")), as_json=False)
    header = capsys.readouterr().out.splitlines()[0]
    assert header.split() == [
        "run",
        "method",
        "matrix",
        "n",
        "pearson_r",
        "slope",
        "between",
        "layers",
    ]


def test_a_program_gets_every_column(capsys: pytest.CaptureFixture[str]) -> None:
    statistics = compute_statistics(table())
    show_statistics(statistics, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [list(row) for row in rows] == [list(COLUMNS)] * len(statistics)
    assert rows[0]["pearson_r_low"] == pytest.approx(statistics["pearson_r_low"].iloc[0], rel=1e-14)
    assert rows[-1]["run"] is None


@pytest.mark.parametrize(
    ("r", "written"),
    [
        *((0.834, "+0.83"), (0.9949, "+0.99"), (0.9990, "+0.9990"), (-0.99897, "-0.9990")),
        *((1.0, "+1.00"), (0.99999, "+1.00"), (1.09, "+1.09")),
    ],
)
def test_an_r_near_one_is_written_finer(r: float, written: str) -> None:
    assert correlation(r) == written


def test_ends_of_an_interval_are_written_alike() -> None:
    assert ends(-0.9985, 0.99) == ("-1.00", "+0.99")
    assert ends(-0.9999, 0.9999) == ("-1.00", "+1.00")
    assert ends(0.9994, 0.99991) == ("+0.9994", "+0.9999")


def test_of_one_label_all_of_them_are_not_told_again(capsys: pytest.CaptureFixture[str]) -> None:
    cloud = Population().draw(6, np.random.default_rng(0))
    one = {("lora", "lora", "query"): cloud}
    show_statistics(compute_statistics(table_of_clouds(one)), as_json=False)
    assert "all" not in capsys.readouterr().out
    two = one | {("lora", "lora", "value"): cloud}
    show_statistics(compute_statistics(table_of_clouds(two)), as_json=False)
    assert "lora, all: r" in capsys.readouterr().out
