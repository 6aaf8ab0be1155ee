"""The formulas for ΔM and ΔD against 50-digit arithmetic, and what must hold of any update."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wda.decomposition import (
    Decomposition,
    check_per,
    decompose,
    decomposition,
    displacement,
)
from wda.engine import moved
from wda.updates import Dense

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def random_pair(
    size: float, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w0 = torch.randn(7, 11, generator=generator, dtype=torch.float64)
    # Rows of very different norms, as real matrices have.
    w0 *= torch.logspace(-2, 1, 7, dtype=torch.float64)[:, None]
    change = (
        size
        * w0.norm(dim=1, keepdim=True)
        * torch.randn(7, 11, generator=generator, dtype=torch.float64)
    )
    return w0.to(dtype), (w0 + change).to(dtype)


@pytest.mark.parametrize("per", ["output", "input"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12])
def test_agrees_with_50_digits_on_the_stored_values(
    size: float, dtype: torch.dtype, per: str
) -> None:
    w0, wt = random_pair(size, dtype)
    delta_m, delta_d = oracle.deltas(oracle.vectors(w0, per), oracle.vectors(wt, per))
    for d in (decompose(w0, wt, per=per), streamed(w0, wt, per)):
        # 16 digits less what squaring lengths and summing tens of terms cost.
        assert d.delta_m == pytest.approx(delta_m, rel=1e-6, abs=1e-20)
        assert d.delta_d == pytest.approx(delta_d, rel=1e-6, abs=1e-30)


def streamed(w0: torch.Tensor, wt: torch.Tensor, per: str) -> Decomposition:
    """The way of the engine, through the compiled kernels where there is one."""
    move = moved(w0, [Dense(wt)], per)[0].move  # type: ignore[arg-type]
    return decomposition(move)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float64, 1e200),
        (torch.float64, 1e300),
        (torch.float64, 1e-200),
        (torch.float64, 1e-300),
        (torch.float32, 1e37),
        (torch.float32, 1e-37),
        (torch.float32, 1e-42),  # denormal
        (torch.bfloat16, 1e37),
        (torch.bfloat16, 1e-38),
        (torch.float16, 1e4),
        (torch.float16, 1e-6),  # denormal
    ],
    ids=str,
)
def test_huge_and_denormal_numbers(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    w0, wt = (start * scale).to(dtype), ((1.1 * start + 0.1) * scale).to(dtype)
    magnitude, direction = oracle.changes(
        oracle.vectors(w0, "output"), oracle.vectors(wt, "output")
    )
    for d in (decompose(w0, wt), streamed(w0, wt, "output")):
        assert d.magnitude_change.tolist() == pytest.approx([float(m) for m in magnitude], rel=1e-9)
        assert d.direction_change.tolist() == pytest.approx([float(x) for x in direction], rel=1e-9)


@pytest.mark.parametrize("start", DTYPES, ids=str)
@pytest.mark.parametrize("end", DTYPES, ids=str)
def test_base_and_checkpoint_may_differ_in_dtype(start: torch.dtype, end: torch.dtype) -> None:
    w0, _ = random_pair(0, start)
    _, wt = random_pair(1e-2, end)
    truth = oracle.deltas(oracle.vectors(w0, "output"), oracle.vectors(wt, "output"))
    d = streamed(w0, wt, "output")
    assert (d.delta_m, d.delta_d) == pytest.approx(truth, rel=1e-7)


def test_small_updates_keep_their_digits_where_float32_has_none() -> None:
    w0, wt = random_pair(1e-6, torch.float64)
    _, truth = oracle.deltas(oracle.vectors(w0, "output"), oracle.vectors(wt, "output"))
    naive = (1 - torch.nn.functional.cosine_similarity(w0.float(), wt.float())).mean()
    assert abs(float(naive) / truth - 1) > 0.01
    assert decompose(w0, wt).delta_d == pytest.approx(truth, rel=1e-8)


def test_pure_rescaling_changes_no_direction() -> None:
    w0, _ = random_pair(0, torch.float32)
    d = decompose(w0, 1.5 * w0.double())  # exact in float64, so that only wda can round
    assert d.delta_d < 1e-30
    assert d.delta_m == pytest.approx(0.5 * float(w0.double().norm(dim=1).mean()), rel=1e-7)


def test_pure_rotation_changes_no_magnitude() -> None:
    angle = 1e-3
    w0 = torch.tensor([[3.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    turn = torch.tensor(
        [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]],
        dtype=torch.float64,
    )
    d = decompose(w0, w0 @ turn)
    assert d.delta_m < 1e-15
    assert d.delta_d == pytest.approx(2 * math.sin(angle / 2) ** 2, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_growth_does_not_swallow_a_small_turn(dtype: torch.dtype) -> None:
    """A difference of large squares would: here 1 − cos is 4e-15 beside a growth by 12.5 %."""
    w0 = torch.tensor([[1.0, 0.0, 0.0]], dtype=dtype)
    wt = torch.tensor([[1.125, 1e-7, 0.0]], dtype=dtype)
    _, truth = oracle.deltas(oracle.vectors(w0, "output"), oracle.vectors(wt, "output"))
    for d in (decompose(w0, wt), streamed(w0, wt, "output")):
        assert d.delta_d == pytest.approx(truth, rel=1e-12, abs=0)


def test_a_reversed_vector_has_direction_change_two() -> None:
    w0 = torch.tensor([[1.0, 2.0, -1.0]])
    d = decompose(w0, -w0)
    assert d.delta_d == pytest.approx(2, abs=1e-15)
    assert d.delta_m == pytest.approx(0, abs=1e-15)


def test_zero_vectors_have_magnitude_but_no_direction() -> None:
    w0 = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    wt = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    d = decompose(w0, wt)
    assert d.magnitude_change.tolist() == [5.0, -5.0, 0.0, 0.0]
    assert d.n_undirected == 3
    assert d.delta_d == 1.0
    assert d.delta_m == 2.5


def test_all_zero_has_no_direction_at_all() -> None:
    d = decompose(torch.zeros(2, 3), torch.zeros(2, 3))
    assert math.isnan(d.delta_d)
    assert d.delta_m == 0


numbers = st.floats(-1e3, 1e3, allow_nan=False, width=32)


@given(
    st.lists(numbers, min_size=6, max_size=6),
    st.lists(numbers, min_size=6, max_size=6),
    st.floats(1e-9, 10),
)
@settings(max_examples=300, deadline=None)
def test_identity_and_range_hold_for_any_update(
    start: list[float], direction: list[float], size: float
) -> None:
    w0 = torch.tensor(start, dtype=torch.float64).reshape(2, 3)
    delta = size * torch.tensor(direction, dtype=torch.float64).reshape(2, 3)
    wt = w0 + delta
    d = decompose(w0, wt)
    m_0, m_t = w0.norm(dim=1), wt.norm(dim=1)
    squared = (wt - w0).square().sum(dim=1)
    rebuilt = d.magnitude_change.square() + 2 * m_0 * m_t * d.direction_change.nan_to_num()
    expected = torch.where(d.direction_change.isnan(), (m_t - m_0).square(), squared)
    assert torch.allclose(rebuilt, expected, rtol=1e-9, atol=1e-280)
    known = d.direction_change[~d.direction_change.isnan()]
    assert ((known >= 0) & (known <= 2 + 1e-15)).all()


def test_displacement_splits_along_and_across() -> None:
    w0 = torch.tensor([[0.0, 2.0, 0.0]], dtype=torch.float64)
    move = displacement(w0, torch.tensor([[3.0, -1.0, 4.0]], dtype=torch.float64))
    assert (move.norm.item(), move.along.item(), move.across.item()) == (2.0, -1.0, 5.0)
    assert move.final_norm.item() == pytest.approx(math.sqrt(26))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"one shape .*got \(2, 3\) and \(3, 2\)"):
        decompose(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match='per must be "output" or "input", got \'row\''):
        check_per("row")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per", ["output", "input"])
def test_vectors_that_end_at_zero_have_no_direction(dtype: torch.dtype, per: str) -> None:
    """Whatever they were: none is mistaken for one with a direction because of rounding."""
    torch.manual_seed(0)
    w0 = torch.randn(200, 130).to(dtype)
    wt = w0.clone()
    (wt if per == "output" else wt.T)[:100] = 0
    move = moved(w0, [Dense(wt)], per)[0].move  # type: ignore[arg-type]
    for change in (decomposition(move), decompose(w0, wt, per)):  # type: ignore[arg-type]
        assert change.n_undirected == 100
        assert change.delta_d == 0
        norms = w0.double().norm(dim=1 if per == "output" else 0)
        lost = norms[:100].sum() / len(norms)
        assert change.delta_m == pytest.approx(float(lost), rel=1e-12)
