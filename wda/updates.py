r"""The algebra of an update: what turns W0 into Wt, without forming a product it can avoid.

An update knows how every row of W0 moves (:class:`~wda.decomposition.Displacement`). It can be
cut into blocks of rows, so that W0 streams past all updates once, and transposed, so that
``per="input"`` is the same computation on the transposed matrices.

=========================  ===================================  =============================
class                      Wt                                   cost of a row's displacement
=========================  ===================================  =============================
:class:`Dense`             the stored matrix                    O(in)
:class:`LowRank`           W0 + s·B·A                           O(in·r), B·A is never formed
:class:`WeightDecomposed`  m ⊙ V/‖V‖ with V = W0 + s·B·A        the same
:class:`ColumnScaled`      (W0 + s·B·A) ⊙ κ, a transposed DoRA  the same, twice
=========================  ===================================  =============================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from wda.decomposition import Displacement, displacement
from wda.rows import Factors, Rows, wide_blocks

# Below this share of the largest value it could have, a squared length that was got by subtraction
# has lost six of its sixteen digits; the rows concerned are then computed directly.
_CANCELLED = 1e-6


@runtime_checkable  # for the shape checks of the tests
class RowUpdate(Protocol):
    """What turns the rows of W0, shape (vectors, features), into those of Wt."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (vectors, features) of the matrix this update applies to."""
        ...

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors A that it asks W0's rows to be multiplied with."""
        ...

    @property
    def ends(self) -> tuple[Tensor, ...]:
        """The rows of Wt, where it holds them as they are."""
        ...

    def displacement(self, w0: Rows) -> Displacement:
        """Tell how each row of ``w0``, of this update's shape, moves."""
        ...


@runtime_checkable
class Update(RowUpdate, Protocol):
    """An update of a whole weight matrix, as it is read from a checkpoint."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype its numbers are stored in."""
        ...

    def to(self, device: str) -> Update:
        """Give the same update with its numbers on a device."""
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

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors A that it asks W0's rows to be multiplied with."""
        return ()

    @property
    def ends(self) -> tuple[Tensor, ...]:
        """The rows of Wt, where it holds them as they are."""
        return (self.weight,)

    def to(self, device: str) -> Dense:
        """Give the same update with its numbers on a device."""
        return Dense(self.weight.to(device))

    def transposed(self, w0: Tensor) -> Dense:  # noqa: ARG002
        """Give the update of W0ᵀ."""
        return Dense(self.weight.T)

    def displacement(self, w0: Rows) -> Displacement:
        """Tell how each row moves, from δ = Wt − W0."""
        products = w0.products(self.weight)
        if products is None:
            return w0.displacements(lambda start, some: self.weight[some].double() - start)
        c, g = products

        def delta(some: Tensor) -> Tensor:
            return self.weight[some].double() - w0.stored[some].double()

        return _from_products(w0, c, g, g, delta)


def inner_products(
    projected: Float[Tensor, "vectors rank"],
    gram: Float[Tensor, "rank rank"],
    B: Float[Tensor, "vectors rank"],
    scaling: float,
) -> tuple[Float[Tensor, "vectors"], Float[Tensor, "vectors"]]:
    """Inner products of the rows of δ = s·B·A with those of W0 and with themselves.

    With them ‖w_0 + δ‖² = ‖w_0‖² + 2c + g, which is what a weight-decomposed layer divides by.
    Neither B·A nor W0 + s·B·A is formed; differentiable in all tensors.

    Parameters
    ----------
    projected : Tensor
        W0·Aᵀ.
    gram : Tensor
        A·Aᵀ.
    B : Tensor
        The factor on the left.
    scaling : float
        The factor s.

    Returns
    -------
    c : Tensor
        ⟨w_0, δ⟩ of every row.
    g : Tensor
        ‖δ‖² of every row.
    """
    c = scaling * (projected * B).sum(dim=1)
    g = scaling**2 * ((B @ gram) * B).sum(dim=1)
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

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors A that it asks W0's rows to be multiplied with."""
        return (self.A,)

    @property
    def ends(self) -> tuple[Tensor, ...]:
        """The rows of Wt, where it holds them as they are."""
        return ()

    def to(self, device: str) -> LowRank:
        """Give the same update with its numbers on a device."""
        return LowRank(self.A.to(device), self.B.to(device), self.scaling)

    def transposed(self, w0: Tensor) -> LowRank:  # noqa: ARG002
        """Give the update of W0ᵀ: (B·A)ᵀ = Aᵀ·Bᵀ."""
        return LowRank(self.B.T, self.A.T, self.scaling)

    def displacement(self, w0: Rows) -> Displacement:
        """Tell how each row moves, by inner products of rank-sized rows."""
        B, gram = self.B.double(), w0.factors.gram(self.A)
        c, g = inner_products(w0.times(self.A), gram, B, self.scaling)
        # What ‖δ‖² could be at most, if the rank-one terms did not cancel each other.
        largest = self.scaling**2 * B.square().sum(dim=1) * gram.trace()

        def delta(some: Tensor) -> Tensor:
            return self.scaling * (B[some] @ self.A.double())

        return _from_products(w0, c, g, largest, delta)


@dataclass(frozen=True)
class WeightDecomposed:
    """Wt = m ⊙ V/‖V‖ with V = W0 + s·B·A, row by row: DoRA, Eq. 5 of arXiv 2402.09353.

    An update of the magnitudes alone is one whose direction has rank 0.

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

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors A that it asks W0's rows to be multiplied with."""
        return self.direction.factors

    @property
    def ends(self) -> tuple[Tensor, ...]:
        """The rows of Wt, where it holds them as they are."""
        return ()

    def to(self, device: str) -> WeightDecomposed:
        """Give the same update with its numbers on a device."""
        return WeightDecomposed(self.direction.to(device), self.magnitude.to(device))

    def transposed(self, w0: Tensor) -> ColumnScaled:
        """Give the update of W0ᵀ, whose columns are scaled where the rows of W0 were."""
        move = self.direction.displacement(Rows(w0, Factors(self.factors)))
        return ColumnScaled(self.direction.transposed(w0), self._scale(move))

    def displacement(self, w0: Rows) -> Displacement:
        """Tell how each row moves: V's displacement, stretched by κ = m/‖V‖."""
        move = self.direction.displacement(w0)
        scale = self._scale(move)
        along = scale * (move.norm + move.along) - move.norm
        return Displacement(move.norm, along, scale.abs() * move.across)

    def _scale(self, move: Displacement) -> Float[Tensor, vectors]:
        """κ = m/‖V‖ of every row; 0 where V is zero and has no direction to scale."""
        v_norm = move.final_norm
        return torch.where(v_norm > 0, self.magnitude.double() / v_norm, 0.0)


class ColumnScaled:
    """Wt = (W0 + s·B·A) ⊙ κ with one factor per column: a transposed DoRA.

    With δ = (κ − 1) ⊙ W0 + κ ⊙ s·B·A every inner product falls into sums over W0's squares, which
    κ weighs, and over products with two factors, κ ⊙ A and κ(κ − 1) ⊙ A.

    Parameters
    ----------
    low_rank : LowRank
        The update before it is scaled.
    scale : Tensor
        κ, one number per column.
    """

    def __init__(self, low_rank: LowRank, scale: Float[Tensor, features]) -> None:
        self.low_rank, self.scale = low_rank, scale
        A = low_rank.A.double()
        self.factors = (scale * A, scale * (scale - 1) * A)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (vectors, features)."""
        return self.low_rank.shape

    @property
    def ends(self) -> tuple[Tensor, ...]:
        """The rows of Wt, where it holds them as they are."""
        return ()

    def displacement(self, w0: Rows) -> Displacement:
        """Tell how each row moves, by inner products of rank-sized rows."""
        B, A, s = self.low_rank.B.double(), self.low_rank.A.double(), self.low_rank.scaling
        grown = self.scale - 1
        squares = w0.weighted_squares(grown, grown.square())
        if squares is None:
            return w0.displacements(
                lambda start, some: grown * start + self.scale * (s * (B[some] @ A))
            )
        scaled, mixed = self.factors
        gram = w0.factors.gram(scaled)
        c, g = inner_products(w0.times(scaled), gram, B, s)
        c, g = c + squares[0], g + squares[1] + 2 * s * (w0.times(mixed) * B).sum(dim=1)
        largest = squares[1] + s**2 * B.square().sum(dim=1) * gram.trace()

        def delta(some: Tensor) -> Tensor:
            return grown * w0.stored[some].double() + self.scale * (s * (B[some] @ A))

        return _from_products(w0, c, g, largest, delta)


def _from_products(
    w0: Rows,
    c: Float[Tensor, "vectors"],
    g: Float[Tensor, "vectors"],
    largest: Float[Tensor, "vectors"],
    delta: Callable[[Tensor], Tensor],
) -> Displacement:
    """Turn c = ⟨w_0, δ⟩ and g = ‖δ‖² into a displacement.

    q² = g − u² subtracts; where too little of ``largest`` is left, the rows that ``delta`` is asked
    for are computed from their δ after all.
    """
    norm = w0.norm.clone()
    along = c / torch.where(norm > 0, norm, 1.0)
    across_squared = g - along.square()
    across = across_squared.clamp(min=0).sqrt()
    lost = (across_squared < _CANCELLED * largest).nonzero().squeeze(1)
    for block in wide_blocks(len(lost), w0.stored):
        some = lost[block]
        exact = displacement(w0.stored[some].double(), delta(some))
        norm[some], along[some], across[some] = exact.norm, exact.along, exact.across
    return Displacement(norm, along, across)
