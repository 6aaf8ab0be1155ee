"""Floors against what rounding really does: casting, and rounding factors and magnitudes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import moved as shifted
from conftest import pico_weights, save_model, wda_command

import wda
from wda import engine
from wda.decomposition import decompose
from wda.floors import TIMES, floor_delta_d, floor_delta_m
from wda.rows import spacing
from wda.updates import ColumnScaled, Computed, Dense, LowRank, Update, WeightDecomposed

OUT, IN, RANK = 320, 257, 7
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]


def weights(seed: int = 0) -> torch.Tensor:
    """Rows of lengths that differ, with some numbers near zero and some that are."""
    generator = torch.Generator().manual_seed(seed)
    w0 = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    w0 *= 0.02 * torch.linspace(0.3, 2, OUT, dtype=torch.float64)[:, None]
    w0[:, 3] = 0
    return w0


def floors(w0: torch.Tensor, update: Update, per: str = "output") -> tuple[float, float]:
    (one,) = engine.moved(w0, [update], per)  # type: ignore[arg-type]
    return floor_delta_m(one.rounding), floor_delta_d(one.move.norm, one.rounding)


def shown(before: torch.Tensor, after: torch.Tensor, per: str = "output") -> tuple[float, float]:
    change = decompose(before, after, per)  # type: ignore[arg-type]
    return change.delta_m, change.delta_d


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_neighbours_are_as_far_apart_as_torch_has_them(dtype: torch.dtype) -> None:
    numbers = torch.tensor([1.0, 1.5, 0.3, 1e-4, 1e3, -0.7, 0.0, 6e-8], dtype=dtype)
    away = torch.where(numbers >= 0, torch.inf, -torch.inf).to(dtype)
    apart = (torch.nextafter(numbers, away).double() - numbers.double()).abs()
    assert torch.equal(spacing(numbers, dtype), apart)


@pytest.mark.parametrize("per", ["output", "input"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floor_of_weights_is_what_casting_shows(dtype: torch.dtype, per: str) -> None:
    w0 = weights()
    cast = w0.to(dtype)
    assert floors(w0, Dense(cast), per) == pytest.approx(shown(w0, cast.double(), per), rel=0.1)


@pytest.mark.parametrize("per", ["output", "input"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_coarser_of_the_two_dtypes_counts(dtype: torch.dtype, per: str) -> None:
    """Summed by the kernels, whichever of the two is the coarse one."""
    w0 = weights().float()
    coarse = w0.to(dtype)
    expected = pytest.approx(shown(w0.double(), coarse.double(), per), rel=0.1)
    assert floors(w0, Dense(coarse), per) == expected
    assert floors(coarse, Dense(w0), per) == expected
    assert floors(coarse, Dense(coarse), per) == expected


def test_bfloat16_turns_by_the_known_amount() -> None:
    """Vectors of 4096 normal numbers: ΔD 1.4e-6, ΔM 3.7e-5 of the norm."""
    torch.manual_seed(0)
    w0 = torch.randn(8, 4096).bfloat16()
    delta_m, delta_d = floors(w0, Dense(w0))
    assert delta_d == pytest.approx(1.4e-6, rel=0.05)
    assert delta_m / 64 == pytest.approx(3.7e-5, rel=0.25)


@pytest.mark.parametrize("per", ["output", "input"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_floor_of_factors_is_what_rounding_them_shows(dtype: torch.dtype, per: str) -> None:
    w0 = weights()
    generator = torch.Generator().manual_seed(5)
    A = 0.3 * torch.randn(RANK, IN, generator=generator, dtype=torch.float64)
    B = 0.05 * torch.randn(OUT, RANK, generator=generator, dtype=torch.float64)
    s = 5 / RANK
    error = s * (B.to(dtype).double() @ A.to(dtype).double() - B @ A)
    expected = shown(w0, w0 + error, per)
    got = floors(w0, LowRank(A.to(dtype), B.to(dtype), s), per)
    assert got == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_floor_of_magnitudes_is_what_rounding_them_shows(dtype: torch.dtype) -> None:
    w0 = weights()
    magnitude = w0.norm(dim=1).to(dtype)
    none = LowRank(torch.empty(0, IN), torch.empty(OUT, 0), 1.0)
    got, turned = floors(w0, WeightDecomposed(none, magnitude))
    expected = float((magnitude.double() - w0.norm(dim=1)).abs().mean())
    assert got == pytest.approx(expected, rel=0.15)
    assert turned == 0


def test_scaled_factors_are_rounded_with_their_scale() -> None:
    generator = torch.Generator().manual_seed(5)
    A = 0.3 * torch.randn(RANK, IN, generator=generator).bfloat16()
    B = 0.05 * torch.randn(OUT, RANK, generator=generator).bfloat16()
    w0 = weights()
    plain = floors(w0, LowRank(A, B, 0.5))
    doubled = floors(w0, ColumnScaled(LowRank(A, B, 0.5), torch.full((IN,), 2.0).double()))
    assert doubled == pytest.approx((2 * plain[0], 4 * plain[1]), rel=1e-6)


@pytest.mark.parametrize("per", ["output", "input"])
@pytest.mark.parametrize("kind", ["stored", "formed"])
def test_levels_that_are_known_count_instead_of_the_dtype(kind: str, per: str) -> None:
    """Numbers packed into whole multiples of a step."""
    w0, step = weights().float(), 0.001
    packed = (w0 / step).round() * step
    spacings = torch.full_like(w0, step)
    update: Update = (
        Dense(packed, spacings)
        if kind == "stored"
        else Computed((OUT, IN), torch.float32, lambda wide, some: packed[some] - wide, spacings)
    )
    expected = shown(w0.double(), packed.double(), per)
    assert floors(w0, update, per) == pytest.approx(expected, rel=0.1)


def test_rows_near_their_floor_are_flagged(tmp_path: Path) -> None:
    base = {name: t.bfloat16() for name, t in pico_weights().items()}
    save_model(tmp_path / "base", base)
    moved = {"near": 1e-5, "far": 0.3}
    for run, size in moved.items():
        folder = save_model(tmp_path / run, shifted(base, size, seed=1))
        assert folder.is_dir()
    found = wda.compare([tmp_path / run for run in moved], base=tmp_path / "base", progress=False)
    near, far = (found.table.query("run == @run") for run in moved)
    assert near["below_floor"].all()
    assert not far["below_floor"].any()
    assert (far["delta_d"] > TIMES * far["floor_delta_d"]).all()
    (note,) = (note for note in found.notes if "below_floor" in note)
    assert "near: 6 of 6 points lie under three times" in note


def test_rows_near_their_floor_stay_out_of_the_fits_on_request(
    runs: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    found = wda.compare(runs["lora"], base=base, matrices="query", null=None, progress=False)
    found.table.loc[found.table["step"] == 9, "below_floor"] = True
    found.save(tmp_path / "out")
    kept = wda.reopen(tmp_path / "out", leave_out_floored=True)
    counts = [c.statistics.loc[0, ["n", "n_below_floor"]].tolist() for c in (found, kept)]
    assert counts == [[9, 3], [6, 3]]
    done = wda_command(
        "figures", tmp_path / "out", "--leave-out-floored", "--out", "again", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "3 points under three times their floor are left out" in done.stdout


def test_nothing_is_flagged_that_is_far_above(runs: dict[str, Path], base: Path) -> None:
    found = wda.compare([runs["lora"], runs["dora"]], base=base, progress=False)
    assert not found.table["below_floor"].any()
    assert not [note for note in found.notes if "below_floor" in note]


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "Q4_1", "Q5_1"])
def test_levels_of_ggufs_types_are_as_far_apart_as_rounding_shows(kind: str) -> None:
    import gguf

    from wda.checkpoints.gguf import _LEVELS
    from wda.checkpoints.levels import even

    numbers = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    of_type = gguf.GGMLQuantizationType[kind]
    packed = torch.from_numpy(gguf.dequantize(gguf.quantize(numbers.numpy(), of_type), of_type))
    rounded = (packed - numbers).square().mean()
    steps = even(packed, *_LEVELS[kind])
    assert float(rounded) == pytest.approx(float(steps.square().mean() / 12), rel=0.1)
