"""Compiled sums over rows, in one pass over numbers as they are stored.

Half-precision numbers are widened in registers, so a row crosses memory once and at its stored
size. All sums are float64. The threads of the interpreter run while a kernel does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def _compiled(function: Callable[..., None]) -> Any:
    """Compile a kernel, and keep the result for later processes where a folder can be written to.

    Sums may be taken in any order, so that they are vectorised; NaN and Inf keep their meaning.
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no place for its cache
        return numba.njit(**options)(function)


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


def _kernels(widen: Callable[[Any], Any]) -> tuple[Any, Any]:
    @_compiled
    def squared_norms(w0: Any, norms: Any) -> None:
        for i in range(w0.shape[0]):
            a = 0.0
            for j in range(w0.shape[1]):
                x = widen(w0[i, j])
                a += x * x
            norms[i] = a

    @_compiled
    def products(w0: Any, wt: Any, c: Any, g: Any) -> None:
        for i in range(w0.shape[0]):
            along = 0.0
            length = 0.0
            for j in range(w0.shape[1]):
                x = widen(w0[i, j])
                delta = widen(wt[i, j]) - x
                along += x * delta
                length += delta * delta
            c[i] = along
            g[i] = length

    return squared_norms, products


# float64 is not among them: its squares can leave float64's range, so it takes the careful way.
_KERNELS = {
    torch.bfloat16: _kernels(_widen_bfloat16),
    torch.float16: _kernels(_widen_float16),
    torch.float32: _kernels(_widen_float),
}


def takes(rows: Tensor) -> bool:
    """Tell whether there is a kernel for the dtype and layout of these rows."""
    return rows.dtype in _KERNELS and rows.device.type == "cpu" and rows.stride(-1) == 1


def squared_norms(w0: Float[Tensor, "vectors features"]) -> Float[Tensor, "vectors"]:
    """Give ‖w_0‖² of every row, in float64."""
    norms = np.empty(w0.shape[0])
    _KERNELS[w0.dtype][0](_codes(w0), norms)
    return torch.from_numpy(norms)


def products_with_change(
    w0: Float[Tensor, "vectors features"], wt: Float[Tensor, "vectors features"]
) -> tuple[Float[Tensor, "vectors"], Float[Tensor, "vectors"]]:
    """Give ⟨w_0, δ⟩ and ‖δ‖² of every row, with δ = w_t − w_0, in float64.

    Parameters
    ----------
    w0, wt : Tensor
        Rows before and after, of one dtype and shape.

    Returns
    -------
    c : Tensor
        ⟨w_0, δ⟩ of every row.
    g : Tensor
        ‖δ‖² of every row.
    """
    c, g = np.empty(w0.shape[0]), np.empty(w0.shape[0])
    _KERNELS[w0.dtype][1](_codes(w0), _codes(wt), c, g)
    return torch.from_numpy(c), torch.from_numpy(g)


def _codes(rows: Tensor) -> np.ndarray:
    """Give the numbers to numpy, which has no bfloat16, as what they are or as their bits."""
    if rows.dtype == torch.float32:
        return rows.numpy()
    return rows.view(torch.uint16).numpy()
