"""What an update is: it knows how every row of W0 moves."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from wda.decomposition import Displacement, displacement
from wda.floors import Rounding
from wda.rows import Rows, wide_blocks

# Which rows of a block: one behind the other, or one by one.
Some = slice | Tensor

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

    def rounding(self, w0: Rows) -> Rounding:
        """Tell how far each row of ``w0`` would move by the rounding of what is stored alone."""
        ...

    def delta(self, w0: Tensor, some: Some) -> Tensor:
        """Form δ = Wt − W0 of some rows in float64, given these rows of W0 in float64."""
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


def merged(update: RowUpdate, w0: Float[Tensor, "vectors features"]) -> Tensor:
    """Form Wt in float64, given W0 of the update's shape."""
    wide = w0.double()
    return wide + update.delta(wide, slice(None))


def from_products(
    update: RowUpdate,
    w0: Rows,
    c: Float[Tensor, "vectors"],
    g: Float[Tensor, "vectors"],
    largest: Float[Tensor, "vectors"],
) -> Displacement:
    """Turn c = ⟨w_0, δ⟩ and g = ‖δ‖² into a displacement.

    q² = g − u² subtracts; where too little of ``largest`` is left, the rows concerned are computed
    from the update's δ after all.
    """
    norm = w0.norm.clone()
    along = c / torch.where(norm > 0, norm, 1.0)
    across_squared = g - along.square()
    across = across_squared.clamp(min=0).sqrt()
    lost = (across_squared < _CANCELLED * largest).nonzero().squeeze(1)
    for block in wide_blocks(len(lost), w0.stored):
        some = lost[block]
        start = w0.stored[some].double()
        exact = displacement(start, update.delta(start, some))
        norm[some], along[some], across[some] = exact.norm, exact.along, exact.across
    return Displacement(norm, along, across)
