"""The numbers of a row against the formed weights, for vectors, heads and the whole matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PICO_SHAPES, moved, pico_weights, save_model
from safetensors.torch import load_file

import wda
from wda.changes import head_size
from wda.errors import ManifestError
from wda.naming import Matrix
from wda.table import QUANTILES

HEADS = {"query": 5, "key": 5, "value": 4}  # of 2 rows each


@pytest.fixture
def headed(base: Path) -> Path:
    """The pico base, which says how many heads it has."""
    config = {"num_attention_heads": 5, "num_key_value_heads": 4}
    (base / "config.json").write_text(json.dumps(config))
    return base


def compared(run: Path, base: Path, **options: Any) -> pd.DataFrame:
    return wda.compare(run, base=base, null=None, progress=False, **options).table


def weights(folder: Path, row: Any) -> torch.Tensor:
    tensors = load_file(folder / f"checkpoint-{row.step}" / "model.safetensors")
    return tensors[f"{row.module}.weight"].double()


@pytest.mark.parametrize("per", ["output", "input"])
def test_all_numbers_of_a_row(per: str, runs: dict[str, Path], base: Path) -> None:
    before = pico_weights()
    axis = 1 if per == "output" else 0
    table = compared(runs["ft"], base, per=per)
    assert len(table) == 18
    for row in table.itertuples():
        w0 = before[f"{row.module}.weight"].double().numpy()
        wt = weights(runs["ft"], row).numpy()
        m_0, m_t = np.linalg.norm(w0, axis=axis), np.linalg.norm(wt, axis=axis)
        turned = 1 - (w0 * wt).sum(axis=axis) / (m_0 * m_t)
        assert row.delta_m_signed == pytest.approx((m_t - m_0).mean(), rel=1e-9)
        assert row.delta_m_relative == pytest.approx((abs(m_t - m_0) / m_0).mean(), rel=1e-9)
        assert row.update_norm == pytest.approx(np.linalg.norm(wt - w0), rel=1e-9)
        relative = np.linalg.norm(wt - w0) / np.linalg.norm(w0)
        assert row.relative_update == pytest.approx(relative, rel=1e-9)
        assert row.share_grown == (m_t > m_0).mean()
        assert (row.granularity, row.head) == ("vector", pd.NA)
        for q in QUANTILES:
            grown = np.percentile(m_t - m_0, q)
            assert getattr(row, f"magnitude_q{q:02}") == pytest.approx(grown, rel=1e-9)
            angle = np.percentile(turned, q)
            assert getattr(row, f"direction_q{q:02}") == pytest.approx(angle, rel=1e-8)


def test_ranks_are_those_of_the_adapters(runs: dict[str, Path], base: Path) -> None:
    table = wda.compare(list(runs.values()), base=base, null=None, progress=False).table
    assert table.query("run == 'ft'")["rank"].isna().all()
    assert table.query("run != 'ft'")["rank"].tolist() == [3] * 36


@pytest.mark.parametrize("method", ["ft", "dora"])
def test_a_row_per_head_is_of_its_vectors(method: str, runs: dict[str, Path], headed: Path) -> None:
    found = wda.compare(
        runs[method], base=headed, granularity="head", vectors=True, null=None, progress=False
    )
    assert (found.table["granularity"] == "head").all()
    assert len(found.table) == 3 * 3 * (5 + 4)
    assert (found.table["n_vectors"] == 2).all()
    vectors = found.vectors
    assert vectors is not None
    assert len(vectors) == 3 * 3 * (10 + 8)
    place = ["step", "module", "head"]
    by_head = vectors.groupby(place)
    means = by_head.agg(
        delta_m=("magnitude_change", lambda change: change.abs().mean()),
        delta_d=("direction_change", "mean"),
    )
    rows = found.table.set_index(place)[["delta_m", "delta_d"]]
    pd.testing.assert_frame_equal(
        rows.sort_index(), means.sort_index(), rtol=1e-12, check_index_type=False
    )


@pytest.mark.parametrize("per", ["output", "input"])
@pytest.mark.parametrize("method", ["ft", "dora"])
def test_the_matrix_as_one_vector(method: str, per: str, runs: dict[str, Path], base: Path) -> None:
    table = compared(runs[method], base, granularity="matrix", per=per)
    plain = compared(runs[method], base, per=per)
    assert (table["granularity"] == "matrix").all()
    assert (table["n_vectors"] == 1).all()
    assert table["update_norm"].tolist() == pytest.approx(plain["update_norm"].tolist(), rel=1e-9)
    before = pico_weights()
    norms = [float(before[f"{row.module}.weight"].double().norm()) for row in table.itertuples()]
    m_0, m_t = np.array(norms), np.array(norms) + table["delta_m_signed"]
    # ‖Wt − W0‖² = Δm² + 2·m_0·m_t·(1 − cos) for the long vector as for any.
    squared = table["delta_m"] ** 2 + 2 * m_0 * m_t * table["delta_d"]
    assert squared.tolist() == pytest.approx((table["update_norm"] ** 2).tolist(), rel=1e-9)
    if method == "ft":
        row = next(table.itertuples())
        w0, wt = before[f"{row.module}.weight"].double(), weights(runs["ft"], row)
        assert row.delta_m == pytest.approx(abs(float(wt.norm() - w0.norm())), rel=1e-9)


def matrix(label: str, shape: tuple[int, int] = (64, 48)) -> Matrix:
    return Matrix("m", label, 0, False, shape)


@pytest.mark.parametrize(
    ("label", "per", "config", "expected"),
    [
        ("query", "output", {"num_attention_heads": 8, "num_key_value_heads": 2}, 8),
        ("key", "output", {"num_attention_heads": 8, "num_key_value_heads": 2}, 32),
        ("value", "output", {"n_head": 4}, 16),
        ("output", "input", {"num_attention_heads": 8}, 6),
        ("query", "output", {"text_config": {"num_attention_heads": 16}}, 4),
        ("query", "input", {"num_attention_heads": 8}, None),
        ("output", "output", {"num_attention_heads": 8}, None),
        ("up", "output", {"num_attention_heads": 8}, None),
        ("query", "output", {"num_attention_heads": 7}, None),
        ("query", "output", {}, None),
    ],
)
def test_heads_are_told_by_the_configuration(
    label: str, per: str, config: dict[str, Any], expected: int | None
) -> None:
    assert head_size(matrix(label), config, per) == expected  # type: ignore[arg-type]


def test_matrices_without_heads_keep_one_row(tmp_path: Path, base: Path) -> None:
    run = save_model(tmp_path / "run", moved(pico_weights(), 0.1, seed=0))
    found = wda.compare(run, base=base, granularity="head", null=None, progress=False)
    assert (found.table["granularity"] == "vector").all()
    assert any("attention heads" in note for note in found.notes)
    assert len(found.table) == 3 * (len(PICO_SHAPES) - 1)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"granularity": "row"}, "granularity: 'row' is not one; give one of vector, head, matrix"),
        ({"null": "normal"}, "null: 'normal' is not one; give one of None, isotropic, rank"),
    ],
)
def test_unknown_words_are_refused(
    argument: dict[str, Any], message: str, runs: dict[str, Path], base: Path
) -> None:
    with pytest.raises(ManifestError, match=message):
        wda.compare(runs["ft"], base=base, progress=False, **argument)


def test_rows_per_head_come_from_the_cache_too(runs: dict[str, Path], headed: Path) -> None:
    by_head = compared(runs["dora"], headed, granularity="head")
    again = wda.compare(runs["dora"], base=headed, granularity="head", null=None, progress=False)
    assert again.provenance["rows_computed_before"] == len(by_head)
    pd.testing.assert_frame_equal(again.table, by_head, check_exact=True)
    plain = wda.compare(runs["dora"], base=headed, null=None, progress=False)
    assert plain.provenance["rows_computed_before"] == 0
