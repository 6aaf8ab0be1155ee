"""The compiled sums against torch in float64, over every number a format has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wda import kernels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_number_is_widened_right(dtype: torch.dtype) -> None:
    """Also denormals, both zeros, the infinities and what is no number."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    column = numbers[:, None].contiguous()
    expected = column.double().square().squeeze(1)
    assert torch.equal(kernels.squared_norms(column).nan_to_num(-1), expected.nan_to_num(-1))
    c, g = kernels.products_with_changes(torch.ones_like(column), [column] * 3)
    change = (column.double() - 1).squeeze(1)
    for i in range(3):
        assert torch.equal(c[i].nan_to_num(-1), change.nan_to_num(-1))
        assert torch.equal(g[i].nan_to_num(-1), change.square().nan_to_num(-1))


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype_t", DTYPES, ids=str)
def test_sums_are_float64(dtype: torch.dtype, dtype_t: torch.dtype) -> None:
    torch.manual_seed(0)
    w0 = torch.randn(5, 1237).to(dtype)
    wts = [(w0.float() + 1e-2 * torch.randn(5, 1237)).to(dtype_t) for _ in range(3)]
    c, g = kernels.products_with_changes(w0, wts)
    for i, wt in enumerate(wts):
        delta = wt.double() - w0.double()
        assert torch.allclose(c[i], (w0.double() * delta).sum(dim=1), rtol=1e-12, atol=1e-14)
        assert torch.allclose(g[i], delta.square().sum(dim=1), rtol=1e-14)
    assert torch.allclose(kernels.squared_norms(w0), w0.double().square().sum(dim=1), rtol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_with_factors_are_float64(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    w0, A = torch.randn(53, 37).to(dtype), torch.randn(5, 37, dtype=torch.float64)
    expected = w0.double() @ A.T
    assert torch.allclose(kernels.project(w0, A.T.contiguous()), expected, rtol=1e-12, atol=1e-14)
    monkeypatch.setattr(kernels, "_WIDE_ELEMENTS", 1)  # in steps of 16 rows, the last one shorter
    assert torch.allclose(kernels.project(w0, A.T.contiguous()), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_across_memory_give_the_same(dtype: torch.dtype, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    w0, A = torch.randn(1237, 53).to(dtype), torch.randn(5, 1237, dtype=torch.float64)
    wts = [(w0.float() + 1e-2 * torch.randn(1237, 53)).to(dtype) for _ in range(3)]
    by_rank = A.T.contiguous()
    norms = kernels.squared_norms(w0.T.contiguous())
    products = kernels.products_with_changes(w0.T.contiguous(), [wt.T.contiguous() for wt in wts])
    projected = kernels.project(w0.T.contiguous(), by_rank)
    for wide in (1 << 19, 1):
        monkeypatch.setattr(kernels, "_WIDE_ELEMENTS", wide)
        across = kernels.products_with_changes(w0.T, [wt.T for wt in wts])
        assert torch.allclose(kernels.squared_norms(w0.T), norms, rtol=1e-13)
        for one, other in zip(across, products, strict=True):
            assert torch.allclose(one, other, rtol=1e-11, atol=1e-13)
        assert torch.allclose(kernels.project(w0.T, by_rank), projected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_squares_are_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w0, u, v = torch.randn(1237, 53).to(dtype), torch.randn(53).double(), torch.randn(1237).double()
    along = kernels.weighted_squares(w0, u, u.square())
    across = kernels.weighted_squares(w0.T, v, v.square())
    squares = w0.double().square()
    for found, expected in (
        (along[0], squares @ u),
        (along[1], squares @ u.square()),
        (across[0], squares.T @ v),
        (across[1], squares.T @ v.square()),
    ):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_what_no_kernel_takes() -> None:
    assert kernels.takes(torch.zeros(2, 3))
    assert not kernels.takes(torch.zeros(2, 3, dtype=torch.float64))
    assert not kernels.takes(torch.zeros(4, 6)[::2, ::2])
