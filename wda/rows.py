"""W0 in blocks of rows, so that it streams past any number of updates in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from wda import kernels
from wda.decomposition import Displacement, displacement, join

Value = TypeVar("Value")

# Elements that are held in float64 at a time, by device, where no kernel does the work.
WIDE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 25}


def row_blocks(shape: tuple[int, int], elements: int) -> Iterator[slice]:
    """Cut the rows of a matrix into slices of at most so many elements each, but a row at least."""
    rows, features = shape
    step = max(1, elements // max(1, features))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def wide_blocks(rows: int, like: Tensor) -> Iterator[slice]:
    """Cut so many rows, as long as those of ``like``, into as many as are widened at a time."""
    return row_blocks((rows, like.shape[1]), WIDE_ELEMENTS[like.device.type])


def spacing(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Give how far apart numbers of a dtype are around each of these, in float64."""
    format_ = torch.finfo(dtype)
    wide = numbers.double()
    power = torch.exp2(torch.frexp(wide).exponent.double() - 1)
    return format_.eps * torch.where(wide == 0, 0.0, power).clamp(min=format_.tiny)


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
        self.by_rank = torch.cat(double).T.contiguous() if double else None
        self._place = {
            id(A): slice(end - len(A), end) for A, end in zip(factors, ends, strict=True)
        }
        self._gram = {id(A): D @ D.T for A, D in zip(factors, double, strict=True)}

    def place(self, A: Tensor) -> slice:
        """Tell which columns of the product are ``A``'s."""
        return self._place[id(A)]

    def gram(self, A: Tensor) -> Float[Tensor, "rank rank"]:
        """Give A·Aᵀ."""
        return self._gram[id(A)]


class Lazy(Generic[Value]):
    """A property that is computed when it is first asked for.

    ``functools.cached_property`` would do, if before Python 3.12 it did not let one thread at a
    time compute, whatever the instance.
    """

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self._compute = compute

    def __get__(self, instance: object, owner: type) -> Value:
        value = instance.__dict__[self._compute.__name__] = self._compute(instance)
        return value


class Rows:
    """A block of rows of W0, as stored, and what several updates ask of it, computed once.

    Parameters
    ----------
    stored : Tensor
        The rows, shape (vectors, features), in their stored dtype.
    factors : Factors
        Those of the updates that will ask.
    ends : sequence of Tensor
        The same rows of Wt, of the updates that hold them as they are.
    """

    def __init__(
        self,
        stored: Float[Tensor, "vectors features"],
        factors: Factors,
        ends: Sequence[Float[Tensor, "vectors features"]] = (),
    ) -> None:
        self.stored = stored
        self.factors = factors
        self._ends = ends
        self._spacings: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    @Lazy
    def norm(self) -> Float[Tensor, "vectors"]:
        """m_0 of every row, in float64."""
        if kernels.takes(self.stored):
            return kernels.squared_norms(self.stored).sqrt()
        return self.displacements(lambda w0, _some: torch.zeros_like(w0)).norm

    def displacements(self, delta: Callable[[Tensor, slice], Tensor]) -> Displacement:
        """Displace the rows by what ``delta`` gives for some of them, in float64, block by block.

        Parameters
        ----------
        delta : callable
            Gives the moves of some rows, given these rows of W0 in float64 and which they are.
        """
        wide = ((self.stored[some].double(), some) for some in self._wide_blocks())
        return join([displacement(w0, delta(w0, some)) for w0, some in wide])

    def products(
        self, end: Tensor
    ) -> tuple[Float[Tensor, "vectors"], Float[Tensor, "vectors"]] | None:
        """Give ⟨w_0, δ⟩ and ‖δ‖² for one of the ends, or None where no kernel takes it."""
        return self._products.get(id(end))

    def squared_spacings(
        self, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "vectors"], Float[Tensor, "vectors"]]:
        """Give Σ s² and Σ s²·w_0² of every row, s the distance of a number's neighbours in a dtype.

        Numbers are as near to each other as in the coarser of this dtype and their own.
        """
        coarser = max(dtype, self.stored.dtype, key=lambda one: torch.finfo(one).eps)
        if coarser not in self._spacings:
            self._spacings[coarser] = self._squared_spacings(coarser)
        return self._spacings[coarser]

    def _squared_spacings(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if kernels.takes(self.stored):
            return kernels.squared_spacings(self.stored, dtype)
        found = []
        for some in self._wide_blocks():
            w0 = self.stored[some].double()
            squares = spacing(w0, dtype).square()
            found.append((squares.sum(dim=1), (squares * w0.square()).sum(dim=1)))
        of_squares, of_products = zip(*found, strict=True)
        return torch.cat(of_squares), torch.cat(of_products)

    def weighted_squares(
        self, u: Float[Tensor, "features"], v: Float[Tensor, "features"]
    ) -> tuple[Float[Tensor, "vectors"], Float[Tensor, "vectors"]] | None:
        """Give Σ u·w_0² and Σ v·w_0² of every row, or None where no kernel takes it."""
        return kernels.weighted_squares(self.stored, u, v) if kernels.takes(self.stored) else None

    def times(self, A: Tensor) -> Float[Tensor, "vectors rank"]:
        """Give W0·Aᵀ in float64, for one of the factors."""
        return self._projected[:, self.factors.place(A)]

    @Lazy
    def _products(self) -> dict[int, tuple[Tensor, Tensor]]:
        found: dict[int, tuple[Tensor, Tensor]] = {}
        taken = [end for end in self._ends if self._goes_with(end)]
        for dtype in dict.fromkeys(end.dtype for end in taken):
            alike = [end for end in taken if end.dtype == dtype]
            c, g = kernels.products_with_changes(self.stored, alike)
            found |= {id(end): (c[i], g[i]) for i, end in enumerate(alike)}
        return found

    def _goes_with(self, end: Tensor) -> bool:
        """Tell whether a kernel takes rows of W0 and Wt together: they must lie alike."""
        alike = kernels.lie_across(self.stored) == kernels.lie_across(end)
        return alike and kernels.takes(self.stored) and kernels.takes(end)

    @Lazy
    def _projected(self) -> Tensor:
        by_rank = self.factors.by_rank
        assert by_rank is not None
        if kernels.takes(self.stored):
            return kernels.project(self.stored, by_rank)
        return torch.cat([self.stored[some].double() @ by_rank for some in self._wide_blocks()])

    def _wide_blocks(self) -> Iterator[slice]:
        return wide_blocks(len(self.stored), self.stored)
