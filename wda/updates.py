r"""The algebra of an update: what turns W0 into Wt, without forming a product it can avoid.

An update knows how every row of W0 moves (:class:`~wda.decomposition.Displacement`). It can be
cut into blocks of rows, so that W0 streams past all updates once, and transposed, so that
``per="input"`` is the same computation on the transposed matrices.

======================  =====================================  ==================================
class                   Wt                                     cost of a row's displacement
======================  =====================================  ==================================
:class:`Dense`          the stored matrix                      O(in)
:class:`LowRank`        W0 + s·B·A                             O(in·r), B·A is never formed
:class:`WeightDecomposed`  m ⊙ V/‖V‖ with V = W0 + s·B·A       the same
======================  =====================================  ==================================
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from wda.decomposition import Displacement, displacement, join

# Below this share of the largest value it could have, a squared length that was got by subtraction
# has lost six of its sixteen digits; the rows concerned are then computed directly.
_CANCELLED = 1e-6

# Elements of W0 held in float64 at a time (32 MiB); a handful of temporaries of that size exist.
BLOCK_ELEMENTS = 1 << 22


def row_blocks(shape: tuple[int, int]) -> Iterator[slice]:
    """Cut the rows of a matrix into slices of at most ``BLOCK_ELEMENTS`` elements each."""
    rows, features = shape
    step = max(1, BLOCK_ELEMENTS // max(1, features))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@runtime_checkable  # for the shape checks of the tests
class RowUpdate(Protocol):
    """What turns the rows of W0, shape (vectors, features), into those of Wt."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (vectors, features) of the matrix this update applies to."""
        ...

    def rows(self, block: slice) -> RowUpdate:
        """Give the same update restricted to a block of rows."""
        ...

    def displacement(self, w0: Float[Tensor, "vectors features"]) -> Displacement:
        """Tell how each row of ``w0`` moves; ``w0`` is in float64 and of this update's shape."""
        ...


@runtime_checkable
class Update(RowUpdate, Protocol):
    """An update of a whole weight matrix, as it is read from a checkpoint."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype its numbers are stored in."""
        ...

    def rows(self, block: slice) -> Update:
        """Give the same update restricted to a block of rows."""
        ...

    def transposed(self, w0: Tensor) -> RowUpdate:
        """Give the update of W0ᵀ; ``w0`` is the whole matrix, not transposed."""
        ...


@dataclass(frozen=True)
class Dense:
    """Wt as a stored matrix: full fine-tuning, or any weight that was merged."""

    weight: Float[Tensor, "vectors features"]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (vectors, features)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype Wt is stored in."""
        return self.weight.dtype

    def rows(self, block: slice) -> Dense:
        """Give the same update restricted to a block of rows."""
        return Dense(self.weight[block])

    def transposed(self, w0: Tensor) -> Dense:  # noqa: ARG002
        """Give the update of W0ᵀ."""
        return Dense(self.weight.T)

    def displacement(self, w0: Float[Tensor, "vectors features"]) -> Displacement:
        """Tell how each row moves, from δ = Wt − W0."""
        return displacement(w0, self.weight.double() - w0)


def inner_products(
    w0: Float[Tensor, "vectors features"],
    A: Float[Tensor, "rank features"],
    B: Float[Tensor, "vectors rank"],
    scaling: float,
) -> tuple[Float[Tensor, vectors], Float[Tensor, vectors]]:
    """Inner products of the rows of δ = s·B·A with those of W0 and with themselves.

    With them ‖w_0 + δ‖² = ‖w_0‖² + 2c + g, which is what a weight-decomposed layer divides by.
    Neither B·A nor W0 + s·B·A is formed; differentiable in A and B.

    Parameters
    ----------
    w0, A, B : Tensor
        The matrix and the two factors, in one dtype.
    scaling : float
        The factor s.

    Returns
    -------
    c : Tensor
        ⟨w_0, δ⟩ of every row.
    g : Tensor
        ‖δ‖² of every row.
    """
    c = scaling * ((w0 @ A.T) * B).sum(dim=1)
    g = scaling**2 * ((B @ (A @ A.T)) * B).sum(dim=1)
    return c, g


@dataclass(frozen=True)
class LowRank:
    """Wt = W0 + s·B·A: LoRA and what reduces to it.

    Attributes
    ----------
    A, B : Tensor
        The factors, shapes (rank, features) and (vectors, rank).
    scaling : float
        s, the factor in front: α/r for LoRA, α/√r for rsLoRA.
    """

    A: Float[Tensor, "rank features"]
    B: Float[Tensor, "vectors rank"]
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (vectors, features)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the factors are stored in."""
        return self.B.dtype

    def rows(self, block: slice) -> LowRank:
        """Give the same update restricted to a block of rows."""
        return LowRank(self.A, self.B[block], self.scaling)

    def transposed(self, w0: Tensor) -> LowRank:  # noqa: ARG002
        """Give the update of W0ᵀ: (B·A)ᵀ = Aᵀ·Bᵀ."""
        return LowRank(self.B.T, self.A.T, self.scaling)

    def displacement(self, w0: Float[Tensor, "vectors features"]) -> Displacement:
        """Tell how each row moves, by inner products of rank-sized rows.

        q² = ‖δ‖² − u² subtracts; where little is left of it, because δ is almost parallel to the
        row or because the rank-one terms cancel each other, the row's δ is formed after all.
        """
        A, B = self.A.double(), self.B.double()
        norm = torch.linalg.vector_norm(w0, dim=1)
        c, g = inner_products(w0, A, B, self.scaling)
        along = c / torch.where(norm > 0, norm, 1.0)
        across_squared = g - along.square()
        largest = self.scaling**2 * B.square().sum(dim=1) * A.square().sum()
        move = Displacement(norm, along, across_squared.clamp(min=0).sqrt())
        lost = across_squared < _CANCELLED * largest
        return self._direct(w0, move, lost) if lost.any() else move

    def _direct(self, w0: Tensor, move: Displacement, which: Tensor) -> Displacement:
        """Replace the displacement of the rows ``which`` by one computed from their δ."""
        index = which.nonzero().squeeze(1)
        along, across = move.along.clone(), move.across.clone()
        for block in row_blocks((len(index), w0.shape[1])):
            some = index[block]
            delta = self.scaling * (self.B[some].double() @ self.A.double())
            exact = displacement(w0[some], delta)
            along[some], across[some] = exact.along, exact.across
        return Displacement(move.norm, along, across)


@dataclass(frozen=True)
class WeightDecomposed:
    """Wt = m ⊙ V/‖V‖ with V = W0 + s·B·A, row by row: DoRA, Eq. 5 of arXiv 2402.09353.

    Attributes
    ----------
    direction : LowRank
        The update of the direction, s·B·A.
    magnitude : Tensor
        m, the stored magnitude of every row. A negative one turns the row around.
    """

    direction: LowRank
    magnitude: Float[Tensor, vectors]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (vectors, features)."""
        return self.direction.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the factors are stored in."""
        return self.direction.dtype

    def rows(self, block: slice) -> WeightDecomposed:
        """Give the same update restricted to a block of rows."""
        return WeightDecomposed(self.direction.rows(block), self.magnitude[block])

    def transposed(self, w0: Tensor) -> ColumnScaled:
        """Give the update of W0ᵀ, whose columns are scaled where the rows of W0 were."""
        moves = [
            self.direction.rows(block).displacement(w0[block].double())
            for block in row_blocks(self.shape)
        ]
        return ColumnScaled(self.direction.transposed(w0), self._scale(join(moves)))

    def displacement(self, w0: Float[Tensor, "vectors features"]) -> Displacement:
        """Tell how each row moves: V's displacement, stretched by κ = m/‖V‖."""
        move = self.direction.displacement(w0)
        scale = self._scale(move)
        along = scale * (move.norm + move.along) - move.norm
        return Displacement(move.norm, along, scale.abs() * move.across)

    def _scale(self, move: Displacement) -> Float[Tensor, vectors]:
        """κ = m/‖V‖ of every row; 0 where V is zero and has no direction to scale."""
        v_norm = move.final_norm
        return torch.where(v_norm > 0, self.magnitude.double() / v_norm, 0.0)


@dataclass(frozen=True)
class ColumnScaled:
    """Wt = (W0 + s·B·A) ⊙ κ with one factor per column: a transposed DoRA.

    Its rows have no closed form; they are formed a block at a time.
    """

    low_rank: LowRank
    scale: Float[Tensor, features]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (vectors, features)."""
        return self.low_rank.shape

    def rows(self, block: slice) -> ColumnScaled:
        """Give the same update restricted to a block of rows."""
        return ColumnScaled(self.low_rank.rows(block), self.scale)

    def displacement(self, w0: Float[Tensor, "vectors features"]) -> Displacement:
        """Tell how each row moves, from δ = (κ − 1)·W0 + κ·s·B·A."""
        product = self.low_rank.B.double() @ self.low_rank.A.double()
        delta = (self.scale - 1) * w0 + self.scale * (self.low_rank.scaling * product)
        return displacement(w0, delta)
