"""Updates that scale: weight decomposition along either axis, and what it is when transposed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from wda.decomposition import Displacement
from wda.floors import Rounding, of_factors, of_magnitude
from wda.rows import Factors, Rows
from wda.updates.dense import Computed
from wda.updates.low_rank import LowRank, inner_products
from wda.updates.update import RowUpdate, Some, Update, from_products


@dataclass(frozen=True)
class WeightDecomposed:
    """Wt = m ⊙ V/‖V‖ with V = W0 + s·B·A, row by row: DoRA, Eq. 5 of arXiv 2402.09353.

    An update of the magnitudes alone is one whose direction has rank 0.

    Attributes
    ----------
    direction : Update
        The update of the direction: s·B·A, or another that gives V.
    magnitude : Tensor
        m, the stored magnitude of every row. A negative one turns the row around.
    """

    direction: Update
    magnitude: Float[Tensor, vectors]

    ends: ClassVar[tuple[Tensor, ...]] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (vectors, features)."""
        return self.direction.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the direction's numbers are stored in."""
        return self.direction.dtype

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors A that it asks W0's rows to be multiplied with."""
        return self.direction.factors

    def to(self, device: str) -> WeightDecomposed:
        """Give the same update with its numbers on a device."""
        return WeightDecomposed(self.direction.to(device), self.magnitude.to(device))

    def transposed(self, w0: Tensor) -> RowUpdate:
        """Give the update of W0ᵀ, whose columns are scaled where the rows of W0 were."""
        move = self.direction.displacement(Rows(w0, Factors(self.factors)))
        return column_scaled(self.direction.transposed(w0), self._scale(move.final_norm))

    def delta(self, w0: Tensor, some: Some) -> Tensor:
        """Form δ = κ ⊙ V − W0 of some rows in float64."""
        v = w0 + self.direction.delta(w0, some)
        scale = self._scale(torch.linalg.vector_norm(v, dim=1), some)
        return scale[:, None] * v - w0

    def displacement(self, w0: Rows) -> Displacement:
        """Tell how each row moves: V's displacement, stretched by κ = m/‖V‖."""
        move = self.direction.displacement(w0)
        return _stretched(move, self._scale(move.final_norm))

    def rounding(self, w0: Rows) -> Rounding:
        """Tell how far each row would move by the rounding of m, and of what V is made of."""
        return of_magnitude(self.direction.rounding(w0), self.magnitude, w0.norm)

    def _scale(self, v_norm: Tensor, some: Some = slice(None)) -> Float[Tensor, vectors]:
        """κ = m/‖V‖ of every row; 0 where V is zero and has no direction to scale."""
        return torch.where(v_norm > 0, self.magnitude[some].double() / v_norm, 0.0)


@dataclass(frozen=True)
class RowScaled:
    """Wt = κ ⊙ V with one factor per row.

    Attributes
    ----------
    direction : Update
        What turns W0 into V.
    scale : Tensor
        κ, one number per row.
    """

    direction: RowUpdate
    scale: Float[Tensor, vectors]

    ends: ClassVar[tuple[Tensor, ...]] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (vectors, features)."""
        return self.direction.shape

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors A that it asks W0's rows to be multiplied with."""
        return self.direction.factors

    def delta(self, w0: Tensor, some: Some) -> Tensor:
        """Form δ = κ ⊙ V − W0 of some rows in float64."""
        return self.scale[some][:, None] * (w0 + self.direction.delta(w0, some)) - w0

    def displacement(self, w0: Rows) -> Displacement:
        """Tell how each row moves: V's displacement, stretched by κ."""
        return _stretched(self.direction.displacement(w0), self.scale)

    def rounding(self, w0: Rows) -> Rounding:
        """Tell how far each row would move by the rounding of what V is made of."""
        return self.direction.rounding(w0)


class ColumnScaled:
    """Wt = (W0 + s·B·A) ⊙ κ with one factor per column.

    That is a transposed DoRA, and DoRA with one magnitude per input feature. With
    δ = (κ − 1) ⊙ W0 + κ ⊙ s·B·A every inner product falls into sums over W0's squares, which
    κ weighs, and over products with two factors, κ ⊙ A and κ(κ − 1) ⊙ A.

    Parameters
    ----------
    low_rank : LowRank
        The update before it is scaled.
    scale : Tensor
        κ, one number per column.
    """

    ends: ClassVar[tuple[Tensor, ...]] = ()

    def __init__(self, low_rank: LowRank, scale: Float[Tensor, features]) -> None:
        self.low_rank, self.scale = low_rank, scale
        A = low_rank.A.double()
        self.factors = (scale * A, scale * (scale - 1) * A)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (vectors, features)."""
        return self.low_rank.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the factors are stored in."""
        return self.low_rank.dtype

    def to(self, device: str) -> ColumnScaled:
        """Give the same update with its numbers on a device."""
        return ColumnScaled(self.low_rank.to(device), self.scale.to(device))

    def transposed(self, w0: Tensor) -> RowScaled:
        """Give the update of W0ᵀ, whose rows are scaled where the columns of W0 were."""
        return RowScaled(self.low_rank.transposed(w0), self.scale)

    def delta(self, w0: Tensor, some: Some) -> Tensor:
        """Form δ of some rows in float64."""
        return (self.scale - 1) * w0 + self.scale * self.low_rank.delta(w0, some)

    def displacement(self, w0: Rows) -> Displacement:
        """Tell how each row moves, by inner products of rank-sized rows."""
        B, s = self.low_rank.B.double(), self.low_rank.scaling
        grown = self.scale - 1
        squares = w0.weighted_squares(grown, grown.square())
        if squares is None:
            return w0.displacements(self.delta)
        scaled, mixed = self.factors
        gram = w0.factors.gram(scaled)
        c, g = inner_products(w0.times(scaled), gram, B, s)
        c, g = c + squares[0], g + squares[1] + 2 * s * (w0.times(mixed) * B).sum(dim=1)
        largest = squares[1] + s**2 * B.square().sum(dim=1) * gram.trace()
        return from_products(self, w0, c, g, largest)

    def rounding(self, w0: Rows) -> Rounding:
        """Tell how far each row would move by the rounding of κ ⊙ A and of B."""
        A = self.factors[0]
        return of_factors(w0, A, self.low_rank.B, self.low_rank.scaling, self.low_rank.A.dtype)


def column_scaled(direction: RowUpdate, scale: Float[Tensor, features]) -> Update:
    """Give the update to V ⊙ κ, where ``direction`` is the one to V."""
    if isinstance(direction, LowRank):
        return ColumnScaled(direction, scale)

    def form(w0: Tensor, some: Some) -> Tensor:
        return (scale - 1) * w0 + scale * direction.delta(w0, some)

    dtype = direction.dtype if isinstance(direction, Update) else torch.float64
    return Computed(direction.shape, dtype, form)


def column_scale(
    direction: Update, magnitude: Float[Tensor, columns], w0: Float[Tensor, "vectors features"]
) -> Float[Tensor, features]:
    """Give κ = m/‖V‖ of every column: weight decomposition along the other axis.

    Parameters
    ----------
    direction : Update
        The whole update from W0 to V.
    magnitude : Tensor
        m, one number per column, or per group of neighbouring columns: those of one input channel
        of a convolution.
    w0 : Tensor
        The whole of W0.
    """
    turned = direction.transposed(w0)
    norm = turned.displacement(Rows(w0.T, Factors(turned.factors), turned.ends)).final_norm
    size = len(norm) // len(magnitude)
    grouped = norm.view(len(magnitude), size).square().sum(dim=1).sqrt()
    scale = torch.where(grouped > 0, magnitude.double() / grouped, 0.0)
    return scale.repeat_interleave(size)


def _stretched(move: Displacement, scale: Float[Tensor, vectors]) -> Displacement:
    """Give the displacement to κ·V, where ``move`` is the one to V."""
    along = scale * (move.norm + move.along) - move.norm
    return Displacement(move.norm, along, scale.abs() * move.across)
