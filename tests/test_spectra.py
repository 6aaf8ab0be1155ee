"""Spectra against numpy, closed forms and planted directions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from conftest import moved, pico_weights, save_model, save_pico_adapter
from safetensors.torch import save_file
from scipy import stats

from wda.checkpoints import open_base
from wda.errors import CheckpointError, SelectionError, TableError
from wda.manifest import make_manifest
from wda.opening import open_all
from wda.progress import progress_bar
from wda.spectra import (
    COLUMNS,
    VALUES_COLUMNS,
    measure_spectra,
    read_spectra,
    saturation_notes,
    write_spectra,
)
from wda.spectra.directions import find_intruders, principal_angles, random_cosines
from wda.spectra.spectrum import (
    Spectrum,
    low_rank_singular_values,
    singular_values,
    singular_vectors,
)
from wda.updates import LowRank

QUERY = "encoder.layer.0.attention.self.query"


def measured(
    runs: Path | list[Path], base: Path, matrices: str = "query,value", **options: object
) -> tuple[pd.DataFrame, pd.DataFrame]:
    manifest = make_manifest(runs, base, matrices)
    with progress_bar(False) as bar:
        opened = open_all(manifest, bar)
    return measure_spectra(opened.base, opened.pairings, **options)  # type: ignore[arg-type]


def random_matrix(out: int, features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, features, generator=generator, dtype=torch.float64)


def with_values(values: list[float], out: int, features: int) -> torch.Tensor:
    """Give a matrix with these singular values and random directions."""
    left, _ = torch.linalg.qr(random_matrix(out, len(values), 1))
    right, _ = torch.linalg.qr(random_matrix(features, len(values), 2))
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


def test_the_identity_uses_all_its_ranks_and_rank_one_uses_one() -> None:
    identity = singular_values(3 * torch.eye(7, dtype=torch.float64))
    assert identity.effective_rank == pytest.approx(7)
    assert identity.entropy == pytest.approx(math.log(7))
    assert identity.stable_rank == pytest.approx(7)
    assert identity.rank_for(0.9) == 7
    one = singular_values(with_values([4.0], 6, 9))
    assert one.effective_rank == pytest.approx(1, abs=1e-12)
    assert one.stable_rank == pytest.approx(1)
    assert one.rank_for(0.9) == 1
    assert one.energy == pytest.approx(16)


def test_numbers_of_known_singular_values_are_those_of_the_definitions() -> None:
    spectrum = singular_values(with_values([5.0, 3.0, 2.0], 8, 11))
    np.testing.assert_allclose(spectrum.values[:4], [5, 3, 2, 0], atol=1e-14)
    entropy = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2))
    assert spectrum.entropy == pytest.approx(entropy)
    assert spectrum.entropy == pytest.approx(stats.entropy([5, 3, 2]))
    assert spectrum.effective_rank == pytest.approx(math.exp(entropy))
    assert spectrum.stable_rank == pytest.approx(38 / 25)
    assert [spectrum.rank_for(x) for x in (0.65, 0.66, 0.9)] == [1, 2, 3]  # 25, 34 of 38


def test_zero_has_no_rank() -> None:
    zero = singular_values(torch.zeros(4, 6, dtype=torch.float64))
    assert (zero.entropy, zero.effective_rank, zero.stable_rank) == (None, None, None)
    assert zero.rank_for(0.9) is None


@pytest.mark.parametrize("rank", [1, 3, 20])  # 20: more than the matrix has
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_update_has_the_products_singular_values(rank: int, dtype: torch.dtype) -> None:
    A = random_matrix(rank, 14, 3).to(dtype)
    B = random_matrix(9, rank, 4).to(dtype)
    found = low_rank_singular_values(LowRank(A, B, 2.5))
    expected = np.linalg.svd(2.5 * B.double().numpy() @ A.double().numpy(), compute_uv=False)
    count = min(rank, 9)
    np.testing.assert_allclose(found.values, expected[:count], rtol=1e-12)
    assert found.energy == pytest.approx(float((expected**2).sum()))
    assert found.whole
    # As good as those of the product, whose own zeros add nothing.
    dense = singular_values(2.5 * B.double() @ A.double())
    assert found.effective_rank == pytest.approx(dense.effective_rank, rel=1e-11)


@pytest.mark.parametrize(("out", "features"), [(120, 170), (170, 120)])
def test_the_randomised_values_lie_within_their_stated_error(out: int, features: int) -> None:
    matrix = random_matrix(out, features)  # the hardest case: all values are alike
    exact = np.linalg.svd(matrix.numpy(), compute_uv=False)
    spectrum, left = singular_vectors(matrix, exact_up_to=1000)
    assert not spectrum.whole
    assert left.shape == (out, 64)
    assert spectrum.error is not None and 1e-9 < spectrum.error < 0.1
    off = np.abs(spectrum.values.numpy() - exact[:64])
    assert off.max() <= spectrum.error * exact[0]
    # Where the values fall off, it is exact.
    falling = with_values([2.0**-i for i in range(100)], out, features)
    spectrum, left = singular_vectors(falling, exact_up_to=1000)
    assert spectrum.error is not None and spectrum.error < 1e-10
    np.testing.assert_allclose(spectrum.values, [2.0**-i for i in range(64)], atol=1e-13)
    np.testing.assert_allclose(left.T @ left, np.eye(64), atol=1e-9)


def test_randomised_values_are_the_same_every_time_and_leave_the_generator_alone() -> None:
    matrix = random_matrix(90, 80)
    torch.manual_seed(5)
    first = singular_values(matrix, exact_up_to=1)
    drawn = torch.rand(1)
    torch.manual_seed(6)
    assert torch.equal(singular_values(matrix, exact_up_to=1).values, first.values)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)


def test_what_the_leading_values_do_not_tell_is_empty() -> None:
    flat, _ = singular_vectors(random_matrix(200, 210), exact_up_to=1)
    assert (flat.entropy, flat.effective_rank, flat.rank_for(0.9)) == (None, None, None)
    assert flat.energy == pytest.approx(float(random_matrix(200, 210).square().sum()))
    steep, _ = singular_vectors(with_values([2.0**-i for i in range(100)], 200, 210), exact_up_to=1)
    assert steep.rank_for(0.9) == 2  # 1 + 1/4 of 4/3 is 94 %
    assert steep.stable_rank == pytest.approx(4 / 3)


def test_a_zero_matrix_is_taken_also_where_it_is_large() -> None:
    spectrum, _ = singular_vectors(torch.zeros(80, 90, dtype=torch.float64), exact_up_to=1)
    assert spectrum.error == 0
    assert spectrum.stable_rank is None


# --- Directions ---------------------------------------------------------------------------------


def spread(w0_left: torch.Tensor) -> torch.Tensor:
    """Give a direction that has the same small cosine with every vector of a basis."""
    return w0_left.sum(dim=1) / math.sqrt(w0_left.shape[1])


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_planted_intruders_are_found_with_their_energy(shape: tuple[int, int]) -> None:
    w0 = random_matrix(*shape)
    _, w0_left = singular_vectors(w0)
    right = torch.linalg.svd(w0, full_matrices=False).Vh.T
    # The largest direction is new, at right angles to nothing but a little like everything.
    wt = w0 + 60 * torch.outer(spread(w0_left), right.sum(dim=1) / math.sqrt(40))
    spectrum, left = singular_vectors(wt)
    found = find_intruders(left[:, :5], spectrum.values[:5], w0_left, 0.5)
    values = np.linalg.svd(wt.numpy(), compute_uv=False)[:5]
    by_hand = np.linalg.svd(wt.numpy())[0][:, :5].T @ np.linalg.svd(w0.numpy())[0][:, :40]
    intruding = np.abs(by_hand).max(axis=1) < 0.5
    assert intruding[0]
    assert found.count == intruding.sum()
    assert found.energy == pytest.approx((values**2)[intruding].sum() / (values**2).sum())


def test_a_scaled_base_has_no_intruders_and_no_angle() -> None:
    w0 = random_matrix(30, 50)
    _, w0_left = singular_vectors(w0)
    spectrum, left = singular_vectors(1.7 * w0)
    assert find_intruders(left[:, :10], spectrum.values[:10], w0_left, 0.99).count == 0
    assert principal_angles(w0_left[:, :10], left[:, :10]).max() < 1e-5


def test_principal_angles_are_those_that_were_planted() -> None:
    basis, _ = torch.linalg.qr(random_matrix(20, 6))
    planted = torch.deg2rad(torch.tensor([80.0, 25.0, 3.0], dtype=torch.float64))
    turned = basis[:, :3] * planted.cos() + basis[:, 3:] * planted.sin()
    mixed = turned @ torch.linalg.qr(random_matrix(3, 3))[0]  # the same subspace
    np.testing.assert_allclose(principal_angles(basis[:, :3], mixed), [80, 25, 3], rtol=1e-9)


def test_random_cosines_are_those_of_random_directions() -> None:
    # One known vector: the squared cosine of a random direction is a Beta(1/2, (d − 1)/2) number.
    squares = random_cosines(50, 1) ** 2
    assert stats.kstest(squares, stats.beta(0.5, 24.5).cdf).pvalue > 0.01
    # A whole basis of space: caps about ±three axes, each of share 1 − ε, which do not meet.
    assert (random_cosines(3, 3) >= 0.8).mean() == pytest.approx(3 * 0.2, abs=0.03)
    # In general: against directions that are drawn in full.
    random = np.random.default_rng(1)
    known, _ = np.linalg.qr(random.standard_normal((30, 12)))
    directions = random.standard_normal((4000, 30))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    largest = np.abs(directions @ known).max(axis=1)
    assert stats.ks_2samp(random_cosines(30, 12), largest).pvalue > 0.01


# --- Checkpoints --------------------------------------------------------------------------------


def oracle(w0: torch.Tensor, wt: torch.Tensor, k: int, epsilon: float) -> dict[str, float]:
    """The summary's numbers by numpy and scipy, from the definitions."""
    u0 = np.linalg.svd(w0.double().numpy(), full_matrices=False)[0]
    ut, st, _ = np.linalg.svd(wt.double().numpy(), full_matrices=False)
    row = {}
    matrices = {"": wt.double() - w0.double(), "w0_": w0.double(), "wt_": wt.double()}
    for prefix, matrix in matrices.items():
        s = np.linalg.svd(matrix.numpy(), compute_uv=False)
        p = s / s.sum()
        row[f"{prefix}entropy"] = -sum(x * math.log(x) for x in p if x > 0)
        row[f"{prefix}effective_rank"] = math.exp(row[f"{prefix}entropy"])
        row[f"{prefix}stable_rank"] = (s**2).sum() / s[0] ** 2
        row[f"{prefix}rank_90"] = 1 + int((np.cumsum(s**2) < 0.9 * (s**2).sum()).sum())
    largest = np.abs(u0.T @ ut[:, :k]).max(axis=0)
    row["intruders"] = (largest < epsilon).sum()
    row["intruder_energy"] = (st[:k] ** 2)[largest < epsilon].sum() / (st[:k] ** 2).sum()
    angles = np.degrees(scipy.linalg.subspace_angles(u0[:, :k], ut[:, :k]))
    return row | {"principal_angle_mean": angles.mean(), "principal_angle_max": angles.max()}


def merged(name: str, tensors: dict[str, torch.Tensor], method: str) -> torch.Tensor:
    """Wt of an adapter that save_pico_adapter wrote, in float64."""
    path = f"base_model.model.{name}"
    A, B = (tensors[f"{path}.lora_{x}.weight"].double() for x in "AB")
    v = pico_weights()[f"{name}.weight"].double() + 5 / 3 * B @ A
    if method == "lora":
        return v
    magnitude = tensors[f"{path}.lora_magnitude_vector"].double()
    return magnitude[:, None] * v / v.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("method", ["ft", "lora", "dora"])
def test_checkpoints_are_measured_as_by_definition(
    method: str, runs: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    values, summary = measured(runs[method], base, k=4, epsilon=0.9)
    assert {n: str(t) for n, t in summary.dtypes.items()} == {
        n: c.dtype for n, c in COLUMNS.items()
    }
    assert {n: str(t) for n, t in values.dtypes.items()} == {
        n: c.dtype for n, c in VALUES_COLUMNS.items()
    }
    assert len(summary) == 2 * 3 * 3
    assert summary["step"].unique().tolist() == [9, 10, 100]
    assert set(summary["method"]) == {method}
    assert summary["intruders"].between(1, 3).any()  # so that the comparison below can fail
    assert summary["rank_bound"].isna().all() if method != "lora" else True
    for i, step in enumerate((9, 10, 100)):  # noqa: B007 - pandas reads step
        if method == "ft":
            tensors = moved(pico_weights(), 0.02 * (i + 1), seed=i)
        else:
            tensors = save_pico_adapter(tmp_path / "again", method, seed=i)
        for row in summary.query("step == @step").itertuples():
            name, w0 = row.module, pico_weights()[f"{row.module}.weight"]
            wt = tensors[f"{name}.weight"] if method == "ft" else merged(name, tensors, method)
            for column, expected in oracle(w0, wt, 4, 0.9).items():
                found = getattr(row, column)
                assert found == pytest.approx(expected, rel=1e-6, abs=1e-7), (name, column)
            assert (row.out_features, row.in_features) == tuple(w0.shape)
            assert row.rank_bound == 3 if method == "lora" else row.rank_bound is pd.NA
            of = values.query("step == @step and module == @name and of == 'update'")
            delta = np.linalg.svd(wt.double().numpy() - w0.double().numpy(), compute_uv=False)
            np.testing.assert_allclose(of["singular_value"], delta[: len(of)], atol=1e-7)
            assert len(of) == (3 if method == "lora" else min(w0.shape))
            assert of["index"].tolist() == list(range(len(of)))
    assert summary["error"].isna().all()


def test_transposed_and_fused_matrices_are_turned_and_cut(tmp_path: Path) -> None:
    """GPT-2's c_attn lies as (in, 3·out): query, key and value beside each other."""
    base_weight, new_weight = random_matrix(12, 36, 5), random_matrix(12, 36, 6)
    for folder, weight in (("base", base_weight), ("ft", new_weight)):
        (tmp_path / folder).mkdir()
        save_file(
            {"h.0.attn.c_attn.weight": weight.float().contiguous()},
            tmp_path / folder / "model.safetensors",
        )
        (tmp_path / folder / "config.json").write_text('{"model_type": "gpt2", "n_head": 4}')
    values, summary = measured(tmp_path / "ft", tmp_path / "base", "query,value", k=3, epsilon=0.9)
    assert summary["matrix"].tolist() == ["query", "value"]
    for row, columns in zip(summary.itertuples(), (slice(0, 12), slice(24, 36)), strict=True):
        w0, wt = base_weight.float()[:, columns].T, new_weight.float()[:, columns].T
        for column, expected in oracle(w0, wt, 3, 0.9).items():
            assert getattr(row, column) == pytest.approx(expected, rel=1e-6), column
    assert values.groupby(["matrix", "of"]).size().tolist() == [12] * 6


def test_w0_is_decomposed_once_for_all_its_updates(
    runs: dict[str, Path], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wda.spectra import measuring

    seen: list[tuple[int, ...]] = []

    def counted(matrix: torch.Tensor, limit: int) -> tuple[Spectrum, torch.Tensor]:
        seen.append(tuple(matrix.shape))
        return singular_vectors(matrix, limit)

    monkeypatch.setattr(measuring, "singular_vectors", counted)
    parts: list[tuple[int, int, str]] = []
    measured(
        list(runs.values()), base, on_part=lambda d, t, matrix: parts.append((d, t, matrix.label))
    )
    assert len(seen) == 6 * (1 + 9)
    assert [part[:2] for part in parts] == [(i + 1, 54) for i in range(54)]


def test_a_large_matrix_says_what_is_not_known(runs: dict[str, Path], base: Path) -> None:
    _, exact = measured(runs["lora"], base, "query", k=4, epsilon=0.9)
    _, summary = measured(runs["lora"], base, "query", k=4, epsilon=0.9, exact_up_to=1)
    assert summary["wt_effective_rank"].isna().all() and summary["w0_entropy"].isna().all()
    np.testing.assert_allclose(summary["effective_rank"], exact["effective_rank"])  # from factors
    np.testing.assert_allclose(summary["wt_stable_rank"], exact["wt_stable_rank"], rtol=1e-6)
    assert (summary["error"] < 1e-6).all()
    assert summary["intruders"].tolist() == exact["intruders"].tolist()


def test_an_update_of_zero_has_no_rank_and_no_intruders(tmp_path: Path, base: Path) -> None:
    save_model(tmp_path / "same", pico_weights())
    _, summary = measured(tmp_path / "same", base, k=3)
    assert summary[["effective_rank", "entropy", "stable_rank", "rank_90"]].isna().all(axis=None)
    assert (summary["intruders"] == 0).all() and (summary["intruder_energy"] == 0).all()
    assert (summary["principal_angle_max"] < 1e-5).all()
    assert summary["wt_effective_rank"].equals(summary["w0_effective_rank"])


def test_k_is_at_most_what_the_matrix_has(runs: dict[str, Path], base: Path) -> None:
    _, summary = measured(runs["ft"], base, k=10)
    assert summary.groupby("matrix")["k"].unique().map(list).to_dict() == {
        "query": [10],
        "value": [8],
    }


@pytest.mark.parametrize("options", [{"k": 0}, {"epsilon": 0.0}, {"epsilon": 1.5}])
def test_k_and_epsilon_out_of_range_are_refused(
    options: dict[str, float], runs: dict[str, Path], base: Path
) -> None:
    with pytest.raises(SelectionError, match="spectra: k = .* at least 1, and epsilon a cosine"):
        measured(runs["ft"], base, **options)


@pytest.mark.parametrize("where", ["base", "checkpoint"])
def test_nan_is_told_with_its_place(where: str, tmp_path: Path) -> None:
    tensors = pico_weights()
    tensors[f"{QUERY}.weight"] = tensors[f"{QUERY}.weight"].clone()
    tensors[f"{QUERY}.weight"][0, 0] = math.nan
    good, bad = save_model(tmp_path / "good", pico_weights()), save_model(tmp_path / "bad", tensors)
    run, base = (good, bad) if where == "base" else (bad, good)
    with pytest.raises(CheckpointError, match=r"bad: encoder.layer.0.*query holds NaN or Inf"):
        measured(run, base)


# --- Files and notes ----------------------------------------------------------------------------


def test_spectra_are_read_as_they_were_written(
    runs: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    assert read_spectra(tmp_path) is None
    values, summary = measured([runs["lora"], runs["dora"]], base)
    write_spectra(values, summary, tmp_path)
    again = read_spectra(tmp_path)
    assert again is not None
    pd.testing.assert_frame_equal(again[0], values, check_exact=True)
    pd.testing.assert_frame_equal(again[1], summary, check_exact=True)
    summary.drop(columns="intruders").to_csv(tmp_path / "spectra.csv", index=False)
    with pytest.raises(TableError, match="columns missing: intruders; measure them again"):
        read_spectra(tmp_path)
    summary.assign(intruders="many").to_csv(tmp_path / "spectra.csv", index=False)
    with pytest.raises(TableError, match="a column holds what it cannot"):
        read_spectra(tmp_path)
    (tmp_path / "spectra.parquet").write_bytes(b"PAR1")
    with pytest.raises(TableError, match="spectra.parquet: cannot be read"):
        read_spectra(tmp_path)
    (tmp_path / "spectra.csv").unlink()
    with pytest.raises(TableError, match="spectra.csv: is missing beside the other file"):
        read_spectra(tmp_path)


def test_notes_tell_where_the_count_says_nothing() -> None:
    rows = pd.DataFrame(
        {
            "run": ["full", "full", "few", "few"],
            "k": 10,
            "intruders": [10, 10, 10, 2],
            "random_intruders": 10.0,
            "random_cosine": 0.06,
        }
    )
    (note,) = saturation_notes(rows)
    assert note.startswith("full: in 2 of 2 matrices all leading directions are intruders")
    assert saturation_notes(rows[2:]) == []
    (note,) = saturation_notes(rows[2:].assign(random_intruders=1.0, random_cosine=0.7))
    assert note.startswith("in 2 of 2 matrices even random directions are seldom intruders")
    assert "0.70" in note


def test_random_directions_are_nearly_always_intruders_in_real_sizes(tmp_path: Path) -> None:
    weights = {"layers.0.q_proj.weight": random_matrix(300, 320).float()}
    base = save_model(tmp_path / "base", weights)
    save_model(tmp_path / "ft", moved(weights, 0.1, seed=1))
    _, summary = measured(tmp_path / "ft", base, "query")
    assert summary["random_intruders"].tolist() == [10.0]
    assert summary["random_cosine"].between(0.1, 0.3).all()
    assert open_base(base).modules == {"layers.0.q_proj"}
