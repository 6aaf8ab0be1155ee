"""Forms whose difference is a product of matrices entry by entry: LoHa's and LoKr's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wda.checkpoints.forms import Form, Stored, Wanted
from wda.updates import Computed, Some


@dataclass(frozen=True)
class Product:
    """A matrix, or factors of it.

    Attributes
    ----------
    factors : tuple of Stored
        The matrix; or B (out, rank) and A (rank, in); or, for a kernel, B (rank, out), A (rank, in)
        and the core between them (rank, rank, kh, kw).
    """

    factors: tuple[Stored, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, the kernel laid flat."""
        first, last = self.factors[0], self.factors[min(len(self.factors), 2) - 1]
        if len(self.factors) < 3:
            return first.shape[0], last.shape[1]
        rank = first.shape[0]
        return first.shape[1], last.shape[1] * (self.factors[2].shape[1] // rank)

    def rows(self) -> Callable[[Tensor], Tensor]:
        """Read it; give a function that forms some of its rows in float64."""
        if len(self.factors) == 1:
            matrix = self.factors[0].read().double()
            return lambda some: matrix[some]
        b, a = (factor.read().double() for factor in self.factors[:2])
        if len(self.factors) == 3:
            core = self.factors[2].read().double().reshape(b.shape[0], b.shape[0], -1)
            b, a = b.T, torch.einsum("rsk,si->rik", core, a).flatten(1)
        return lambda some: b[some] @ a


@dataclass(frozen=True)
class Paired(Form):
    """What the forms of two products have in common.

    Attributes
    ----------
    left, right : Product
        The two.
    scaling : float
        The factor s.
    """

    left: Product
    right: Product
    scaling: float

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The tensors of both."""
        return *self.left.factors, *self.right.factors

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.scaling

    def update(self, wanted: Wanted) -> Computed:
        """Give W0 + s·δ, δ formed row by row."""
        left, right = self.left.rows(), self.right.rows()
        index = torch.cat([torch.arange(rows.start, rows.stop) for rows in wanted.stored_rows])

        def form(_w0: Tensor, some: Some) -> Tensor:
            return self.scaling * self.joined(left, right, index[some])

        dtype = self.parts[0].tensors.read(self.parts[0].name, again=True).dtype
        return Computed(wanted.shape, dtype, form)

    def joined(
        self,
        left: Callable[[Tensor], Tensor],
        right: Callable[[Tensor], Tensor],
        rows: Tensor,
    ) -> Tensor:
        """Form some rows of the product of both."""
        raise NotImplementedError


@dataclass(frozen=True)
class Hadamard(Paired):
    """W0 + s·(left ⊙ right): LoHa."""

    words: ClassVar[str] = "a Hadamard product of factors"

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.left.shape

    @property
    def rank(self) -> int:
        """Rank of each of the two."""
        return self.left.factors[1].shape[0]

    def joined(
        self,
        left: Callable[[Tensor], Tensor],
        right: Callable[[Tensor], Tensor],
        rows: Tensor,
    ) -> Tensor:
        """Multiply entry by entry."""
        return left(rows) * right(rows)


@dataclass(frozen=True)
class Kronecker(Paired):
    """W0 + s·(left ⊗ right): LoKr. A kernel lies flat in the right one."""

    words: ClassVar[str] = "a Kronecker product"

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        (rows, columns), (inner_rows, inner_columns) = self.left.shape, self.right.shape
        return rows * inner_rows, columns * inner_columns

    def joined(
        self,
        left: Callable[[Tensor], Tensor],
        right: Callable[[Tensor], Tensor],
        rows: Tensor,
    ) -> Tensor:
        """Give the outer products of the rows that each row is made of."""
        inner = self.right.shape[0]
        outer = left(rows // inner)[:, :, None] * right(rows % inner)[:, None, :]
        return outer.flatten(1)
