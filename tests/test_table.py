"""The table and the draws beside it: written, read back, and refused when they do not belong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from wda.draws import Draws, read_draws, write_draws
from wda.errors import TableError
from wda.table import COLUMNS, check_table, make_table

ROW = {
    "run": "a", "method": "lora", "seed": None, "step": 5, "module": "layers.0.q_proj", "layer": 0,
    "matrix": "query", "per": "output", "out_features": 4, "in_features": 3, "n_vectors": 4,
    "delta_m": 0.1, "delta_d": 0.2, "n_undirected": 0, "dtype": "float32", "base_dtype": "float32",
}  # fmt: skip


def test_a_table_of_an_earlier_version_gets_the_columns_it_lacks_without_values() -> None:
    old = pd.DataFrame([ROW])
    new = check_table(old)
    assert set(new.columns) == set(COLUMNS)
    optional = [name for name, column in COLUMNS.items() if not column.required]
    assert new[optional].isna().all(axis=None)
    assert {n: str(t) for n, t in new.dtypes.items()} == {n: c.dtype for n, c in COLUMNS.items()}


def test_required_columns_are_named_when_missing() -> None:
    with pytest.raises(TableError, match="columns missing: delta_d; is it a wda table"):
        check_table(pd.DataFrame([ROW]).drop(columns=["delta_d"]))


def test_draws_are_found_again_beside_their_table(tmp_path: Path) -> None:
    table = make_table([ROW, ROW | {"step": 6, "seed": 1}])
    draws = Draws(np.array(["isotropic", "rank 8"]), np.arange(6.0).reshape(2, 3), np.ones((2, 3)))
    write_draws(draws, table, tmp_path)
    again = read_draws(table, tmp_path)
    assert again is not None and len(again) == 3
    assert again.null.tolist() == ["isotropic", "rank 8"]
    np.testing.assert_array_equal(again.delta_m, draws.delta_m)
    with pytest.raises(TableError, match="belongs to another table"):
        read_draws(table.iloc[::-1], tmp_path)
    (tmp_path / "nulls.parquet").write_bytes(b"PAR1")
    with pytest.raises(TableError, match="cannot be read"):
        read_draws(table, tmp_path)
    (tmp_path / "nulls.parquet").unlink()
    assert read_draws(table, tmp_path) is None
