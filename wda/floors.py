r"""What rounding to the stored numbers alone does to vectors: the floor under ΔM and ΔD.

A number is stored as the nearest of those that its format has. Where these lie s apart, the error
is between −s/2 and s/2, each value as likely as the other, with the variance s²/12. A vector's
errors, independent of each other, move it along itself by a length of variance
Σ s²·w²/(12·m_0²) and in all by one of variance Σ s²/12. So rounding alone would show

    ΔM ≈ mean of √(2/π)·√(E u²),        ΔD ≈ mean of E q²/(2·m_0²),

with u and q as in :mod:`wda.decomposition`. What is measured near these tells nothing of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wda.rows import Rows, spacing

# Changes under so many times their floor are not told from rounding.
TIMES = 3.0

_OF_UNIFORM = 1 / 12  # the variance of an error between −1/2 and 1/2
_MEAN_OF_NORMAL = math.sqrt(2 / math.pi)  # the mean of its absolute value, variance 1


@dataclass(frozen=True)
class Rounding:
    """How far rounding alone would move each vector: expected squared lengths.

    Attributes
    ----------
    along : Tensor
        E u², along the vector; shape (vectors,), float64, ≥ 0.
    across : Tensor
        E q², at right angles to it.
    """

    along: Float[Tensor, vectors]
    across: Float[Tensor, vectors]

    def of(self, rows: slice) -> Rounding:
        """Give those of some vectors."""
        return Rounding(self.along[rows], self.across[rows])

    def cpu(self) -> Rounding:
        """Give the same on the processor, where a device computed it."""
        return Rounding(self.along.cpu(), self.across.cpu())


def join_roundings(parts: Sequence[Rounding]) -> Rounding:
    """Put those of consecutive blocks of vectors into one."""
    return Rounding(
        torch.cat([part.along for part in parts]), torch.cat([part.across for part in parts])
    )


def floor_delta_m(rounding: Rounding) -> float:
    """Give the ΔM that rounding alone would show, in the units of the weight."""
    return _MEAN_OF_NORMAL * float(rounding.along.sqrt().mean())


def floor_delta_d(norm: Float[Tensor, vectors], rounding: Rounding) -> float:
    """Give the ΔD that rounding alone would show; NaN where no vector has a direction."""
    turned = rounding.across / (2 * norm.square())
    return float(torch.where(norm > 0, turned, torch.nan).nanmean())


def of_storage(w0: Rows, dtype: torch.dtype) -> Rounding:
    """Round weights to the coarser of W0's own dtype and the one that Wt is stored in."""
    return _split(w0, *w0.squared_spacings(dtype))


def of_spacings(w0: Rows, spacings: Float[Tensor, "vectors features"]) -> Rounding:
    """Round weights to levels that lie so far apart around each: those of packed numbers."""
    squares = spacings.double().square()
    return _split(w0, squares.sum(dim=1), (squares * w0.stored.double().square()).sum(dim=1))


def of_factors(
    w0: Rows,
    A: Float[Tensor, "rank features"],
    B: Float[Tensor, "vectors rank"],
    scaling: float,
    stored: torch.dtype | None = None,
) -> Rounding:
    """Round the factors of s·B·A to the dtypes they are stored in; A may be told to be of another.

    The errors of A, which all rows share, are taken to point as much along a row as anywhere.
    """
    wide_A, wide_B = A.double(), B.double()
    by_B = spacing(B, B.dtype).square() * _OF_UNIFORM
    by_A = spacing(A, stored or A.dtype).square().sum(dim=1) * _OF_UNIFORM
    through_A = wide_B.square() @ by_A
    along_A = through_A / max(1, A.shape[1])
    norm = torch.where(w0.norm > 0, w0.norm, 1.0)
    along_B = (by_B * (w0.times(A) / norm[:, None]).square()).sum(dim=1)
    total = by_B @ wide_A.square().sum(dim=1) + through_A
    along = along_B + along_A
    return Rounding(scaling**2 * along, scaling**2 * (total - along).clamp(min=0))


def of_magnitude(
    direction: Rounding, magnitude: Float[Tensor, vectors], norm: Float[Tensor, vectors]
) -> Rounding:
    """Round stored magnitudes beside a direction that was rounded on its own.

    Parameters
    ----------
    direction : Rounding
        That of V.
    magnitude : Tensor
        m as it is stored.
    norm : Tensor
        m_0, to whose dtype's neighbours it is rounded: what floors are of has not moved.
    """
    apart = spacing(norm, magnitude.dtype)
    return Rounding(_OF_UNIFORM * apart.square(), direction.across)


def _split(w0: Rows, squares: Tensor, products: Tensor) -> Rounding:
    """Part the whole error Σ s²/12 into what lies along the vector and what lies across it."""
    norm = torch.where(w0.norm > 0, w0.norm, 1.0)
    along = products / norm.square()
    return Rounding(_OF_UNIFORM * along, _OF_UNIFORM * (squares - along).clamp(min=0))
