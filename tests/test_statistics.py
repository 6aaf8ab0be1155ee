"""Fits against numpy's own, and what is said where nothing can be fitted."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from wda.errors import TableError
from wda.statistics import COLUMNS, compute_statistics, fit_line
from wda.table import make_table


def table_of(points: dict[tuple[str, str], list[tuple[float, float]]]) -> pd.DataFrame:
    return make_table(
        {
            "run": run,
            "method": "lora",
            "step": i,
            "module": f"layer.{i}",
            "layer": i,
            "matrix": matrix,
            "per": "output",
            "out_features": 3,
            "in_features": 4,
            "n_vectors": 3,
            "delta_d": x,
            "delta_m": y,
            "n_undirected": 0,
            "dtype": "float32",
            "base_dtype": "float32",
        }
        for (run, matrix), cloud in points.items()
        for i, (x, y) in enumerate(cloud)
    )


def test_fit_agrees_with_numpy_at_any_scale() -> None:
    rng = np.random.default_rng(0)
    for scale in (1.0, 1e-9, 1e6):
        x = scale * rng.random(24)
        y = 3.7 * x + 0.2 * scale * rng.standard_normal(24)
        fit = fit_line(x, y)
        slope, intercept = np.polyfit(x, y, 1)
        assert fit.pearson_r == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-12)
        assert fit.slope == pytest.approx(slope, rel=1e-10)
        assert fit.intercept == pytest.approx(intercept, rel=1e-8)


def test_one_row_per_label_and_one_for_all() -> None:
    query = [(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]
    value = [(0.0, 9.0), (1.0, 7.0), (2.0, 5.0)]
    statistics = compute_statistics(table_of({("a", "query"): query, ("a", "value"): value}))
    assert list(statistics.columns) == list(COLUMNS)
    assert list(statistics["matrix"]) == ["query", "value", "all"]
    assert list(statistics["n"]) == [3, 3, 6]
    assert statistics["slope"].tolist() == pytest.approx([2, -2, 0], abs=1e-12)
    assert statistics["pearson_r"].tolist() == pytest.approx([1, -1, 0], abs=1e-12)
    assert statistics["intercept"].tolist() == pytest.approx([1, 9, 5], abs=1e-12)


@pytest.mark.parametrize(
    "cloud",
    [[(1.0, 2.0)], [(1.0, 2.0), (2.0, 3.0)], [(1.0, 2.0), (1.0, 3.0), (1.0, 4.0)]],
    ids=["one point", "two points", "constant ΔD"],
)
def test_what_is_not_determined_is_empty(cloud: list[tuple[float, float]]) -> None:
    row = compute_statistics(table_of({("a", "query"): cloud})).iloc[0]
    assert row["n"] == len(cloud)
    assert row[["pearson_r", "slope", "intercept"]].isna().all()


def test_constant_delta_m_has_a_slope_but_no_r() -> None:
    row = compute_statistics(table_of({("a", "query"): [(1, 2), (2, 2), (3, 2)]})).iloc[0]
    assert row["slope"] == 0
    assert np.isnan(row["pearson_r"])


def test_points_without_direction_are_left_out() -> None:
    cloud = [(0.0, 1.0), (1.0, 3.0), (np.nan, 50.0), (2.0, 5.0)]
    row = compute_statistics(table_of({("a", "query"): cloud})).iloc[0]
    assert (row["n"], row["slope"]) == (3, pytest.approx(2))


def test_missing_columns_and_rows_are_named() -> None:
    table = table_of({("a", "query"): [(1, 2)]})
    with pytest.raises(TableError, match="columns missing: delta_d, delta_m|delta_m, delta_d"):
        compute_statistics(table.drop(columns=["delta_m", "delta_d"]))
    with pytest.raises(TableError, match="no rows"):
        compute_statistics(table.iloc[:0])
