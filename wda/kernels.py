"""Compiled sums over rows, in one pass over numbers as they are stored.

Half-precision numbers are widened in registers, or into a buffer that fits the cache of a core, so
a row crosses memory once and at its stored size. All sums are float64. A kernel takes many rows in
one call, during which the interpreter's other threads run: handing the interpreter from thread to
thread at every small step costs more than the steps.

Rows may lie along memory or across it, as the rows of a transposed matrix do. Those across are
summed all at once, a stretch of them at a time, so that memory is read in its order all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def compiled(function: Callable[..., None]) -> Any:
    """Compile a kernel, and keep the result for later processes where a folder can be written to.

    Sums may be taken in any order, so that they are vectorised; NaN and Inf keep their meaning.
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no place for its cache
        return numba.njit(**options)(function)


# How much of W0 is widened at a time: little enough to stay in the cache, and rows enough for the
# matrix multiply to be worth its preparations.
_WIDE_ELEMENTS = 1 << 19
_FEWEST_ROWS = 16

# How many rows that lie across memory are summed at a time: their sums stay in the nearest cache.
_STRETCH = 1024

_inlined = numba.njit(inline="always")


@_inlined
def _widen_bfloat16(code: Any) -> Any:
    return np.float64(np.uint32(np.uint32(code) << np.uint32(16)).view(np.float32))


@_inlined
def _widen_float16(code: Any) -> Any:
    """Move exponent and fraction to where float32 has them, and mend the exponent's bias."""
    sign = np.uint32(np.uint32(code & 0x8000) << np.uint32(16))
    rest = np.uint32(np.uint32(code & 0x7FFF) << np.uint32(13))
    # The largest exponent means Inf or NaN in both formats.
    top = np.uint32(0x7F800000) if (code & 0x7C00) == 0x7C00 else np.uint32(0)
    value = np.uint32(rest).view(np.float32) * np.float32(2.0**112)
    special = np.uint32(top | (rest & np.uint32(0x007FFFFF))).view(np.float32)
    magnitude = special if top else value
    return np.float64(-magnitude if sign else magnitude)


@_inlined
def _widen_float(number: Any) -> Any:
    return np.float64(number)


# float64 is not among them: its squares can leave float64's range, so it takes the careful way.
_WIDENED_BY = {
    torch.bfloat16: _widen_bfloat16,
    torch.float16: _widen_float16,
    torch.float32: _widen_float,
}


@_inlined
def _spacing(x: Any, epsilon: Any, smallest: Any) -> Any:
    """Give the distance of a number's neighbours in a format: its power of two, times epsilon."""
    power = np.int64(np.float64(x).view(np.int64) & np.int64(0x7FF0000000000000)).view(np.float64)
    return max(power, smallest) * epsilon


class _Kernels(NamedTuple):
    squared_norms: Any
    squared_spacings: Any
    weighted_squares: Any
    project: Any


class _ProductKernels(NamedTuple):
    products: Any
    products_of_two: Any


@cache
def _kernels_along(dtype: torch.dtype) -> _Kernels:
    """Give the kernels that read W0 alone, for rows along memory."""
    widen = _WIDENED_BY[dtype]

    @compiled
    def squared_norms(w0: Any, a: Any) -> None:
        for i in range(w0.shape[0]):
            norm = 0.0
            for j in range(w0.shape[1]):
                x = widen(w0[i, j])
                norm += x * x
            a[i] = norm

    @compiled
    def squared_spacings(w0: Any, epsilon: float, smallest: float, s: Any, p: Any) -> None:
        for i in range(w0.shape[0]):
            squares = 0.0
            products = 0.0
            for j in range(w0.shape[1]):
                x = widen(w0[i, j])
                spacing = _spacing(x, epsilon, smallest)
                squares += spacing * spacing
                products += spacing * spacing * x * x
            s[i] = squares
            p[i] = products

    @compiled
    def weighted_squares(w0: Any, u: Any, v: Any, by_u: Any, by_v: Any) -> None:
        for i in range(w0.shape[0]):
            sum_u = 0.0
            sum_v = 0.0
            for j in range(w0.shape[1]):
                x = widen(w0[i, j])
                sum_u += x * x * u[j]
                sum_v += x * x * v[j]
            by_u[i] = sum_u
            by_v[i] = sum_v

    @compiled
    def project(w0: Any, by_rank: Any, projected: Any, step: int) -> None:
        wide = np.empty((min(step, w0.shape[0]), w0.shape[1]))
        for start in range(0, w0.shape[0], step):
            stop = min(start + step, w0.shape[0])
            for i in range(start, stop):
                for j in range(w0.shape[1]):
                    wide[i - start, j] = widen(w0[i, j])
            np.dot(wide[: stop - start], by_rank, projected[start:stop])

    return _Kernels(squared_norms, squared_spacings, weighted_squares, project)


@cache
def _kernels_across(dtype: torch.dtype) -> _Kernels:
    """Give the kernels that read W0 alone, for rows across memory."""
    widen = _WIDENED_BY[dtype]

    @compiled
    def squared_norms_across(w0: Any, a: Any) -> None:
        for first in range(0, w0.shape[1], _STRETCH):
            last = min(first + _STRETCH, w0.shape[1])
            for i in range(w0.shape[0]):
                for j in range(first, last):
                    x = widen(w0[i, j])
                    a[j] += x * x

    @compiled
    def squared_spacings_across(w0: Any, epsilon: float, smallest: float, s: Any, p: Any) -> None:
        for first in range(0, w0.shape[1], _STRETCH):
            last = min(first + _STRETCH, w0.shape[1])
            for i in range(w0.shape[0]):
                for j in range(first, last):
                    x = widen(w0[i, j])
                    spacing = _spacing(x, epsilon, smallest)
                    s[j] += spacing * spacing
                    p[j] += spacing * spacing * x * x

    @compiled
    def weighted_squares_across(w0: Any, u: Any, v: Any, by_u: Any, by_v: Any) -> None:
        for first in range(0, w0.shape[1], _STRETCH):
            last = min(first + _STRETCH, w0.shape[1])
            for i in range(w0.shape[0]):
                for j in range(first, last):
                    x = widen(w0[i, j])
                    by_u[j] += x * x * u[i]
                    by_v[j] += x * x * v[i]

    @compiled
    def project_across(w0: Any, by_rank: Any, projected: Any, step: int) -> None:
        wide = np.empty((min(step, w0.shape[0]), w0.shape[1]))
        for start in range(0, w0.shape[0], step):
            stop = min(start + step, w0.shape[0])
            for i in range(start, stop):
                for j in range(w0.shape[1]):
                    wide[i - start, j] = widen(w0[i, j])
            projected += np.dot(wide[: stop - start].T, by_rank[start:stop])

    return _Kernels(
        squared_norms_across, squared_spacings_across, weighted_squares_across, project_across
    )


def _kernels_for(w0: Tensor) -> _Kernels:
    return (_kernels_across if lie_across(w0) else _kernels_along)(w0.dtype)


@cache
def _product_kernels(
    dtype: torch.dtype, dtype_t: torch.dtype
) -> tuple[_ProductKernels, _ProductKernels]:
    """Give those that read W0 and Wt, which need not be of one dtype, for both kinds of rows."""
    widen, widen_t = _WIDENED_BY[dtype], _WIDENED_BY[dtype_t]

    @compiled
    def products(w0: Any, wt: Any, c: Any, g: Any) -> None:
        for i in range(w0.shape[0]):
            along = 0.0
            length = 0.0
            for j in range(w0.shape[1]):
                x = widen(w0[i, j])
                delta = widen_t(wt[i, j]) - x
                along += x * delta
                length += delta * delta
            c[i] = along
            g[i] = length

    # Two at a time, W0 is widened half as often; for more the processor has no registers left.
    @compiled
    def products_of_two(w0: Any, wt: Any, wu: Any, c: Any, g: Any) -> None:
        for i in range(w0.shape[0]):
            along_t = 0.0
            along_u = 0.0
            length_t = 0.0
            length_u = 0.0
            for j in range(w0.shape[1]):
                x = widen(w0[i, j])
                delta_t = widen_t(wt[i, j]) - x
                delta_u = widen_t(wu[i, j]) - x
                along_t += x * delta_t
                along_u += x * delta_u
                length_t += delta_t * delta_t
                length_u += delta_u * delta_u
            c[0, i] = along_t
            c[1, i] = along_u
            g[0, i] = length_t
            g[1, i] = length_u

    @compiled
    def products_across(w0: Any, wt: Any, c: Any, g: Any) -> None:
        for first in range(0, w0.shape[1], _STRETCH):
            last = min(first + _STRETCH, w0.shape[1])
            for i in range(w0.shape[0]):
                for j in range(first, last):
                    x = widen(w0[i, j])
                    delta = widen_t(wt[i, j]) - x
                    c[j] += x * delta
                    g[j] += delta * delta

    @compiled
    def products_of_two_across(w0: Any, wt: Any, wu: Any, c: Any, g: Any) -> None:
        products_across(w0, wt, c[0], g[0])
        products_across(w0, wu, c[1], g[1])

    return (
        _ProductKernels(products, products_of_two),
        _ProductKernels(products_across, products_of_two_across),
    )


def takes(rows: Tensor) -> bool:
    """Tell whether there is a kernel for the dtype and layout of these rows."""
    return rows.dtype in _WIDENED_BY and rows.device.type == "cpu" and 1 in rows.stride()


def lie_across(rows: Tensor) -> bool:
    """Tell whether rows lie across memory, as those of a transposed matrix do."""
    return rows.stride(-1) != 1


def squared_norms(w0: Float[Tensor, "vectors features"]) -> Float[Tensor, "vectors"]:
    """Give ‖w_0‖² of every row, in float64."""
    a = np.zeros(w0.shape[0])
    _kernels_for(w0).squared_norms(_codes(w0), a)
    return torch.from_numpy(a)


def squared_spacings(
    w0: Float[Tensor, "vectors features"], dtype: torch.dtype
) -> tuple[Float[Tensor, "vectors"], Float[Tensor, "vectors"]]:
    """Give Σ s² and Σ s²·w_0² of every row, s the distance of a number's neighbours in a dtype."""
    squares, products = np.zeros(w0.shape[0]), np.zeros(w0.shape[0])
    kernel, format_ = _kernels_for(w0).squared_spacings, torch.finfo(dtype)
    kernel(_codes(w0), format_.eps, format_.tiny, squares, products)
    return torch.from_numpy(squares), torch.from_numpy(products)


def weighted_squares(
    w0: Float[Tensor, "vectors features"],
    u: Float[Tensor, "features"],
    v: Float[Tensor, "features"],
) -> tuple[Float[Tensor, "vectors"], Float[Tensor, "vectors"]]:
    """Give Σ u·w_0² and Σ v·w_0² of every row, in float64, for two sets of weights in float64."""
    by_u, by_v = np.zeros(w0.shape[0]), np.zeros(w0.shape[0])
    kernel = _kernels_for(w0).weighted_squares
    kernel(_codes(w0), u.numpy(), v.numpy(), by_u, by_v)
    return torch.from_numpy(by_u), torch.from_numpy(by_v)


def products_with_changes(
    w0: Float[Tensor, "vectors features"], wts: Sequence[Float[Tensor, "vectors features"]]
) -> tuple[Float[Tensor, "updates vectors"], Float[Tensor, "updates vectors"]]:
    """Give ⟨w_0, δ⟩ and ‖δ‖² of every row and every update, with δ = w_t − w_0, in float64.

    Parameters
    ----------
    w0 : Tensor
        Rows before.
    wts : sequence of Tensor
        The same rows after each update, one or more, all of one dtype and lying as they do.

    Returns
    -------
    c : Tensor
        ⟨w_0, δ⟩, one line per update.
    g : Tensor
        ‖δ‖², one line per update.
    """
    c, g = np.zeros((len(wts), w0.shape[0])), np.zeros((len(wts), w0.shape[0]))
    products, products_of_two = _product_kernels(w0.dtype, wts[0].dtype)[lie_across(w0)]
    start, ends = _codes(w0), [_codes(wt) for wt in wts]
    for i in range(0, len(ends) - 1, 2):
        products_of_two(start, ends[i], ends[i + 1], c[i : i + 2], g[i : i + 2])
    if len(ends) % 2:
        products(start, ends[-1], c[-1], g[-1])
    return torch.from_numpy(c), torch.from_numpy(g)


def project(
    w0: Float[Tensor, "vectors features"], by_rank: Float[Tensor, "features rank"]
) -> Float[Tensor, "vectors rank"]:
    """Give W0·Aᵀ in float64.

    Parameters
    ----------
    w0 : Tensor
        Rows.
    by_rank : Tensor
        Aᵀ, contiguous, in float64.
    """
    projected = np.zeros((w0.shape[0], by_rank.shape[1]))
    codes = _codes(w0)
    step = max(_FEWEST_ROWS, _WIDE_ELEMENTS // max(1, codes.shape[1]))
    _kernels_for(w0).project(codes, by_rank.numpy(), projected, step)
    return torch.from_numpy(projected)


def _codes(rows: Tensor) -> np.ndarray:
    """Give the numbers to numpy, which has no bfloat16, as what they are or as their bits.

    Rows that lie across memory are given as the matrix that lies along it.
    """
    rows = rows.T if lie_across(rows) else rows
    if rows.dtype == torch.float32:
        return rows.numpy()
    return rows.view(torch.uint16).numpy()
