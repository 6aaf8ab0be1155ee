"""Closed forms of updates against 50-digit arithmetic on the merged weight."""

from __future__ import annotations

import oracle
import pytest
import torch

from wda import engine, kernels, rows
from wda.decomposition import decomposition
from wda.updates import (
    Computed,
    Dense,
    LowRank,
    Update,
    WeightDecomposed,
    column_scale,
    column_scaled,
    merged,
)

OUT, IN, RANK, SCALING = 6, 9, 3, 5 / 3


def parts(size: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w0 = torch.randn(OUT, IN, generator=generator)
    A = torch.randn(RANK, IN, generator=generator)
    B = size * torch.randn(OUT, RANK, generator=generator)
    return w0, A, B


def measured(w0: torch.Tensor, update: Update, per: str) -> tuple[float, float]:
    move = engine.moved(w0, [update], per)[0].move  # type: ignore[arg-type]
    d = decomposition(move)
    return d.delta_m, d.delta_d


def truth(w0: torch.Tensor, wt: list[list[object]], per: str) -> tuple[float, float]:
    start = oracle.vectors(w0, per)
    return oracle.deltas(start, wt if per == "output" else oracle.transposed(wt))


@pytest.mark.parametrize("per", ["output", "input"])
@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-6])
def test_low_rank(size: float, per: str) -> None:
    w0, A, B = parts(size)
    got = measured(w0, LowRank(A, B, SCALING), per)
    assert got == pytest.approx(truth(w0, oracle.low_rank_weight(w0, A, B, SCALING), per), rel=1e-8)


@pytest.mark.parametrize("per", ["output", "input"])
@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-6])
def test_weight_decomposed(size: float, per: str) -> None:
    w0, A, B = parts(size)
    magnitude = w0.norm(dim=1) * (1 + torch.linspace(-0.2, 0.3, OUT))
    magnitude[2] *= -1  # nothing stops training from taking one through zero
    wt = oracle.weight_decomposed(oracle.low_rank_weight(w0, A, B, SCALING), magnitude)
    got = measured(w0, WeightDecomposed(LowRank(A, B, SCALING), magnitude), per)
    assert got == pytest.approx(truth(w0, wt, per), rel=1e-7)


@pytest.mark.parametrize("per", ["output", "input"])
def test_magnitudes_alone_are_a_weight_decomposed_update_of_rank_zero(per: str) -> None:
    w0, _, _ = parts(0)
    magnitude = w0.norm(dim=1) * (1 + torch.linspace(-0.2, 0.3, OUT))
    none = LowRank(torch.empty(0, IN), torch.empty(OUT, 0), SCALING)
    got = measured(w0, WeightDecomposed(none, magnitude), per)
    wt = oracle.weight_decomposed(oracle.vectors(w0, "output"), magnitude)
    assert got == pytest.approx(truth(w0, wt, per), rel=1e-8, abs=1e-40)
    assert (got[1] == 0) is (per == "output")


@pytest.mark.parametrize("per", ["output", "input"])
def test_dense(per: str) -> None:
    w0, A, B = parts(1e-3)
    wt = w0 + SCALING * B @ A
    got = measured(w0, Dense(wt), per)
    assert got == pytest.approx(truth(w0, oracle.vectors(wt, "output"), per), rel=1e-8)


def computed(low_rank: LowRank) -> Computed:
    """The same as an update that has to be formed."""
    return Computed(low_rank.shape, torch.float32, low_rank.delta)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("formed", [False, True])
@pytest.mark.parametrize("per", ["output", "input"])
def test_one_magnitude_per_input(
    per: str, formed: bool, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(kernels, "takes", lambda _rows: False)
    w0, A, B = parts(1e-2)
    low_rank = LowRank(A, B, SCALING)
    magnitude = w0.norm(dim=0) * (1 + torch.linspace(-0.2, 0.3, IN))
    magnitude[2] *= -1
    v = oracle.transposed(oracle.low_rank_weight(w0, A, B, SCALING))
    wt = oracle.transposed(oracle.weight_decomposed(v, magnitude))
    direction: Update = computed(low_rank) if formed else low_rank
    scale = column_scale(direction, magnitude, w0)
    got = measured(w0, column_scaled(direction, scale), per)
    assert got == pytest.approx(truth(w0, wt, per), rel=1e-8)
    # The same of some rows, when the lengths of the columns are known.
    some = LowRank(A, B[2:4], SCALING)
    part = measured(w0[2:4], column_scaled(computed(some) if formed else some, scale), "output")
    assert part == pytest.approx(truth(w0[2:4], wt[2:4], "output"), rel=1e-8)


def test_one_magnitude_per_input_channel_of_a_convolution() -> None:
    w0, A, B = parts(1e-2)  # 3 input channels with kernels of 3 numbers each
    magnitude = torch.tensor([1.0, 2.5, 3.0])
    v = w0.double() + SCALING * B.double() @ A.double()
    norm = v.view(OUT, 3, 3).square().sum(dim=(0, 2)).sqrt()
    wt = (v.view(OUT, 3, 3) * (magnitude / norm)[None, :, None]).view(OUT, IN)
    direction = LowRank(A, B, SCALING)
    update = column_scaled(direction, column_scale(direction, magnitude, w0))
    assert torch.allclose(merged(update, w0), wt, rtol=1e-12, atol=0)


@pytest.mark.parametrize("per", ["output", "input"])
def test_magnitudes_of_a_direction_that_is_formed(per: str) -> None:
    w0, A, B = parts(1e-2)
    magnitude = w0.norm(dim=1) * (1 + torch.linspace(-0.2, 0.3, OUT))
    wt = oracle.weight_decomposed(oracle.low_rank_weight(w0, A, B, SCALING), magnitude)
    got = measured(w0, WeightDecomposed(computed(LowRank(A, B, SCALING)), magnitude), per)
    assert got == pytest.approx(truth(w0, wt, per), rel=1e-8)


def test_merged_weights_are_those_the_displacements_speak_of() -> None:
    w0, A, B = parts(1e-2)
    low_rank, magnitude = LowRank(A, B, SCALING), w0.norm(dim=1) * 1.25
    in_turn = column_scale(low_rank, w0.norm(dim=0) * 1.25, w0)
    for update in (
        Dense(w0 + B @ A),
        low_rank,
        computed(low_rank),
        WeightDecomposed(low_rank, magnitude),
        column_scaled(low_rank, in_turn),
        column_scaled(computed(low_rank), in_turn),
    ):
        wt = oracle.vectors(merged(update, w0), "output")
        assert measured(w0, update, "output") == pytest.approx(truth(w0, wt, "output"), rel=1e-9)
        assert measured(w0, update, "input") == pytest.approx(truth(w0, wt, "input"), rel=1e-9)


def test_terms_that_cancel_are_computed_directly() -> None:
    """A converted adapter holds [B, −B0]·[A; A0]: two large products, a small difference."""
    w0, A, B = parts(1.0)
    noise = torch.randn(A.shape, generator=torch.Generator().manual_seed(9))
    A2 = torch.cat([A, A + 1e-6 * noise])
    B2 = torch.cat([B, -B], dim=1)
    got = measured(w0, LowRank(A2, B2, SCALING), "output")
    wt = oracle.low_rank_weight(w0, A2, B2, SCALING)
    assert got == pytest.approx(truth(w0, wt, "output"), rel=1e-8, abs=0)


def test_an_update_along_w0_changes_no_direction() -> None:
    w0, _, _ = parts(1.0)
    B = torch.diag(torch.linspace(0.1, 0.6, OUT))
    delta_m, delta_d = measured(w0, LowRank(w0, B, 1.0), "output")
    assert delta_d < 1e-16
    expected = (torch.linspace(0.1, 0.6, OUT) * w0.norm(dim=1)).double().mean()
    assert delta_m == pytest.approx(float(expected), rel=1e-6)


def test_an_untrained_adapter_changes_nothing() -> None:
    w0, A, B = parts(0.0)
    assert measured(w0, LowRank(A, B, SCALING), "output") == (0.0, 0.0)
    magnitude = w0.double().norm(dim=1)
    delta_m, delta_d = measured(w0, WeightDecomposed(LowRank(A, B, SCALING), magnitude), "output")
    assert delta_m < 1e-15
    assert delta_d == 0


@pytest.mark.parametrize("per", ["output", "input"])
def test_blocks_of_rows_give_the_same(per: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w0, A, B = parts(1e-2)
    low_rank = LowRank(A, B, SCALING)
    chosen = [
        Dense(w0 + B @ A),
        low_rank,
        WeightDecomposed(low_rank, w0.norm(dim=1) * 1.1),
    ]
    whole = [decomposition(m.move) for m in engine.moved(w0, chosen, per)]  # type: ignore[arg-type]
    monkeypatch.setattr(rows, "WIDE_ELEMENTS", {"cpu": 2 * IN})
    monkeypatch.setattr(kernels, "takes", lambda _rows: False)
    assert len(list(rows.wide_blocks(OUT, w0))) == 3
    cut = [decomposition(m.move) for m in engine.moved(w0, chosen, per)]  # type: ignore[arg-type]
    for one, other in zip(whole, cut, strict=True):
        assert torch.allclose(one.magnitude_change, other.magnitude_change, rtol=1e-12)
        assert torch.allclose(one.direction_change, other.direction_change, rtol=1e-12)


def test_low_rank_never_forms_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    w0, A, B = parts(1e-2)
    # What a formed δ would be given to.
    monkeypatch.setattr("wda.updates.update.displacement", None)
    for per in ("output", "input"):
        measured(w0, LowRank(A, B, SCALING), per)
        measured(w0, WeightDecomposed(LowRank(A, B, SCALING), w0.norm(dim=1) * 1.1), per)
