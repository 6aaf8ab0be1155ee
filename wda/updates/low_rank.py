"""Updates of low rank: LoRA, and what reduces to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from wda.decomposition import Displacement
from wda.floors import Rounding, of_factors
from wda.rows import Rows
from wda.updates.update import Some, from_products


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

    ends: ClassVar[tuple[Tensor, ...]] = ()

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

    def to(self, device: str) -> LowRank:
        """Give the same update with its numbers on a device."""
        return LowRank(self.A.to(device), self.B.to(device), self.scaling)

    def transposed(self, w0: Tensor) -> LowRank:  # noqa: ARG002
        """Give the update of W0ᵀ: (B·A)ᵀ = Aᵀ·Bᵀ."""
        return LowRank(self.B.T, self.A.T, self.scaling)

    def delta(self, w0: Tensor, some: Some) -> Tensor:  # noqa: ARG002
        """Form δ = s·B·A of some rows in float64."""
        return self.scaling * (self.B[some].double() @ self.A.double())

    def displacement(self, w0: Rows) -> Displacement:
        """Tell how each row moves, by inner products of rank-sized rows."""
        B, gram = self.B.double(), w0.factors.gram(self.A)
        c, g = inner_products(w0.times(self.A), gram, B, self.scaling)
        # What ‖δ‖² could be at most, if the rank-one terms did not cancel each other.
        largest = self.scaling**2 * B.square().sum(dim=1) * gram.trace()
        return from_products(self, w0, c, g, largest)

    def rounding(self, w0: Rows) -> Rounding:
        """Tell how far each row would move by the rounding of A and B."""
        return of_factors(w0, self.A, self.B, self.scaling)
