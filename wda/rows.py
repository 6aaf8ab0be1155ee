"""W0 in blocks of rows, so that it streams past any number of updates in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from wda import kernels
from wda.decomposition import displacement

# Elements of a block of rows: a few MiB, so that all updates find it in the processor's cache.
BLOCK_ELEMENTS = 1 << 20


def row_blocks(shape: tuple[int, int]) -> Iterator[slice]:
    """Cut the rows of a matrix into slices of at most ``BLOCK_ELEMENTS`` elements each."""
    rows, features = shape
    step = max(1, BLOCK_ELEMENTS // max(1, features))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class Factors:
    """The factors A of all low-rank updates of a matrix, one below the other, in float64.

    Together they make one tall product W0·Aᵀ of what would be many narrow ones.

    Parameters
    ----------
    factors : sequence of Tensor
        One A, shape (rank, features), per low-rank update.
    """

    def __init__(self, factors: Sequence[Tensor]) -> None:
        double = [A.double() for A in factors]
        ends = list(itertools.accumulate(len(A) for A in double))
        self.stacked = torch.cat(double) if double else None
        self._place = {
            id(A): slice(end - len(A), end) for A, end in zip(factors, ends, strict=True)
        }
        self._gram = {id(A): D @ D.T for A, D in zip(factors, double, strict=True)}

    def place(self, A: Tensor) -> slice:
        """Tell which rows of the stack are ``A``."""
        return self._place[id(A)]

    def gram(self, A: Tensor) -> Float[Tensor, "rank rank"]:
        """Give A·Aᵀ."""
        return self._gram[id(A)]


class Rows:
    """A block of rows of W0, as stored, and what several updates ask of it, computed once.

    Parameters
    ----------
    stored : Tensor
        The rows, shape (vectors, features), in their stored dtype.
    factors : Factors
        Those of the updates that will ask.
    """

    def __init__(self, stored: Float[Tensor, "vectors features"], factors: Factors) -> None:
        self.stored = stored
        self.factors = factors

    @cached_property
    def double(self) -> Float[Tensor, "vectors features"]:
        """The rows in float64."""
        return self.stored.double()

    @cached_property
    def norm(self) -> Float[Tensor, "vectors"]:
        """m_0 of every row, in float64."""
        if kernels.takes(self.stored):
            return kernels.squared_norms(self.stored).sqrt()
        none = torch.zeros((), dtype=torch.float64).expand_as(self.stored)
        return displacement(self.double, none).norm

    def times(self, A: Tensor) -> Float[Tensor, "vectors rank"]:
        """Give W0·Aᵀ in float64, for one of the factors."""
        return self._projected[:, self.factors.place(A)]

    @cached_property
    def _projected(self) -> Tensor:
        assert self.factors.stacked is not None
        return self.double @ self.factors.stacked.T
