"""Draws of random updates against brute force: random matrices, formed and decomposed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import pico_weights
from scipy import stats

import wda
from wda import nulls
from wda.changes import flattened
from wda.decomposition import Displacement, decompose, decomposition, displacement
from wda.floors import Rounding

OUT, IN, DRAWS = 9, 6, 400


def weights() -> torch.Tensor:
    w0 = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return w0 * torch.linspace(0.2, 3, OUT, dtype=torch.float64)[:, None]


def brute(w0: torch.Tensor, rank: int | None, size: float, seed: int) -> tuple[Any, Any]:
    """ΔM and ΔD of random updates that are formed, one after another."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found = []
    for _ in range(DRAWS):
        update = normal(OUT, IN) if rank is None else normal(OUT, rank) @ normal(rank, IN)
        change = decompose(w0, w0 + update * (size / update.norm()))
        found.append((change.delta_m, change.delta_d))
    return tuple(zip(*found, strict=True))


def drawn(w0: torch.Tensor, rank: int | None, size: float, seed: int) -> tuple[Any, Any]:
    norms, random = w0.norm(dim=1).numpy(), np.random.default_rng(seed)
    directions = (
        nulls.isotropic(norms, IN, DRAWS, random)
        if rank is None
        else nulls.of_rank(w0, norms, rank, DRAWS, random)
    )
    scales = (size / directions.length)[None]
    delta_m, delta_d = np.empty((1, 1, DRAWS)), np.empty((1, 1, DRAWS))
    nulls.mean_changes(
        norms, directions.along, directions.across, scales, np.array([0, OUT]), delta_m, delta_d
    )
    return delta_m.ravel(), delta_d.ravel()


@pytest.mark.parametrize("size", [0.3, 8.0])
@pytest.mark.parametrize("rank", [None, 1, 2])
def test_draws_are_distributed_as_formed_updates(rank: int | None, size: float) -> None:
    w0 = weights()
    for ours, theirs in zip(drawn(w0, rank, size, 1), brute(w0, rank, size, 2), strict=True):
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-3


def test_an_isotropic_direction_has_as_many_normal_entries_as_a_vector() -> None:
    """So that its squared length is on average their number, of which one lies along."""
    random = np.random.default_rng(0)
    directions = nulls.isotropic(weights().norm(dim=1).numpy(), IN, 20_000, random)
    assert (directions.along**2).mean() == pytest.approx(1, rel=0.02)
    assert (directions.across**2).mean() == pytest.approx(IN - 1, rel=0.02)


def test_another_rank_would_be_noticed() -> None:
    w0 = weights()
    ours, theirs = drawn(w0, 1, 8.0, 1)[1], brute(w0, 2, 8.0, 2)[1]
    assert stats.ks_2samp(ours, theirs).pvalue < 1e-4


def test_means_are_those_of_the_decomposition() -> None:
    """For a long move, with a zero vector among those that move and one that stays."""
    generator = torch.Generator().manual_seed(3)
    w0 = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    w0[2] = 0
    delta = 3 * torch.randn(8, 5, generator=generator, dtype=torch.float64)
    delta[4] = 0
    move = displacement(w0, delta)
    scales = np.array([[0.01], [1.0]])
    delta_m, delta_d = np.empty((2, 2, 1)), np.empty((2, 2, 1))
    nulls.mean_changes(
        move.norm.numpy(), move.along.numpy()[None], move.across.numpy()[None], scales,
        np.array([0, 3, 8]), delta_m, delta_d,
    )  # fmt: skip
    for t, scale in enumerate(scales[:, 0]):
        for group, rows in enumerate((slice(0, 3), slice(3, 8))):
            change = decomposition(displacement(w0[rows], scale * delta[rows]))
            assert delta_m[t, group, 0] == pytest.approx(change.delta_m, rel=1e-12)
            assert delta_d[t, group, 0] == pytest.approx(change.delta_d, rel=1e-12)


def test_a_matrix_as_one_vector_sees_the_same_directions() -> None:
    w0 = weights()
    norms = w0.norm(dim=1)
    directions = nulls.isotropic(norms.numpy(), IN, 3, np.random.default_rng(0))
    one = directions.flattened()
    for k in range(3):
        parts = Displacement(
            norms, torch.from_numpy(directions.along[k]), torch.from_numpy(directions.across[k])
        )
        expected, _ = flattened(parts, Rounding(torch.zeros(OUT), torch.zeros(OUT)))
        assert one.norms[0] == pytest.approx(float(expected.norm))
        assert one.along[k, 0] == pytest.approx(float(expected.along), rel=1e-12)
        assert one.across[k, 0] == pytest.approx(float(expected.across), rel=1e-12)


@pytest.mark.parametrize("granularity", ["vector", "head", "matrix"])
@pytest.mark.parametrize("per", ["output", "input"])
@pytest.mark.parametrize("null", ["isotropic", "rank"])
def test_draws_lie_beside_their_rows(
    null: str, per: str, granularity: str, runs: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    (base / "config.json").write_text('{"num_attention_heads": 2}')
    options: dict[str, Any] = {"null": null, "per": per, "granularity": granularity}
    folders = [runs["ft"], runs["lora"]]
    found = wda.compare(folders, base=base, progress=False, **options)
    draws = found.draws
    assert draws is not None
    assert draws.delta_m.shape == draws.delta_d.shape == (len(found.table), nulls.DRAWS)
    kinds = dict(zip(found.table["run"], draws.null, strict=True))
    assert kinds == {"ft": "isotropic", "lora": "isotropic" if null == "isotropic" else "rank 3"}
    # Random directions are as long as what was measured: ΔD goes with the square of that.
    median = np.median(draws.delta_d, axis=1)
    ratio = median / found.table["relative_update"] ** 2
    assert 0.2 < ratio.median() < 1
    found.save(tmp_path / "out")
    again = wda.reopen(tmp_path / "out").draws
    assert again is not None
    assert np.array_equal(again.delta_m, draws.delta_m)


def test_draws_are_the_same_from_the_cache_and_again(runs: dict[str, Path], base: Path) -> None:
    first = wda.compare(list(runs.values()), base=base, progress=False)
    kept = wda.compare(list(runs.values()), base=base, progress=False)
    anew = wda.compare(list(runs.values()), base=base, cache=False, progress=False)
    assert kept.provenance["rows_computed_before"] == len(first.table)
    for other in (kept, anew):
        assert first.draws is not None
        assert other.draws is not None
        assert np.array_equal(other.draws.delta_d, first.draws.delta_d)
        assert np.array_equal(other.draws.delta_m, first.draws.delta_m)


def test_all_checkpoints_of_a_run_share_their_directions(runs: dict[str, Path], base: Path) -> None:
    """So that a draw is one random update that grows: within a layer its changes go together."""
    found = wda.compare(runs["lora"], base=base, matrices="query", progress=False)
    assert found.draws is not None
    for _, rows in found.table.reset_index().groupby("module"):
        by_size = rows.sort_values("relative_update")["index"].to_numpy()
        assert (np.diff(found.draws.delta_d[by_size], axis=0) > 0).all()


def test_none_are_drawn_where_none_are_wanted(
    runs: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    found = wda.compare(runs["lora"], base=base, null=None, progress=False)
    assert found.draws is None
    found.save(tmp_path / "out")
    assert not (tmp_path / "out" / "nulls.parquet").exists()


def test_every_vector_is_written_beside_the_table(
    runs: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    found = wda.compare(runs["dora"], base=base, vectors=True, progress=False)
    found.save(tmp_path / "out")
    vectors = pd.read_parquet(tmp_path / "out" / "vectors.parquet")
    assert len(vectors) == 3 * 3 * (10 + 8)
    w0 = pico_weights()["encoder.layer.1.attention.self.value.weight"].double()
    layer = vectors.query("layer == 1 and matrix == 'value' and step == 100")
    assert layer["magnitude_before"].tolist() == pytest.approx(w0.norm(dim=1).tolist())
    row = found.table.query("layer == 1 and matrix == 'value' and step == 100").iloc[0]
    assert layer["magnitude_change"].abs().mean() == pytest.approx(row["delta_m"], rel=1e-12)
    assert layer["direction_change"].mean() == pytest.approx(row["delta_d"], rel=1e-12)
    assert layer["vector"].tolist() == list(range(8))
    again = wda.reopen(tmp_path / "out").vectors
    assert again is not None
    pd.testing.assert_frame_equal(again, vectors)
