"""Updates that hold Wt as it is, or can only compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from wda.decomposition import Displacement
from wda.rows import Rows
from wda.updates.update import Some, from_products, merged


@dataclass(frozen=True)
class Dense:
    """Wt as a stored matrix: full fine-tuning, or any weight that was merged."""

    weight: Float[Tensor, "vectors features"]

    factors: ClassVar[tuple[Tensor, ...]] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (vectors, features)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype Wt is stored in."""
        return self.weight.dtype

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

    def delta(self, w0: Tensor, some: Some) -> Tensor:
        """Form δ = Wt − W0 of some rows in float64."""
        return self.weight[some].double() - w0

    def displacement(self, w0: Rows) -> Displacement:
        """Tell how each row moves, from δ = Wt − W0."""
        products = w0.products(self.weight)
        if products is None:
            return w0.displacements(self.delta)
        c, g = products
        return from_products(self, w0, c, g, g)


@dataclass(frozen=True)
class Computed:
    """Wt = W0 + δ with a δ that has to be formed: products of entries, rotations, differences.

    Attributes
    ----------
    shape : tuple of int
        (vectors, features).
    dtype : torch.dtype
        The dtype its numbers are stored in.
    form : callable
        Forms δ of some rows in float64, given these rows of W0 in float64 and which they are.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    form: Callable[[Tensor, Some], Tensor]

    factors: ClassVar[tuple[Tensor, ...]] = ()
    ends: ClassVar[tuple[Tensor, ...]] = ()

    def to(self, device: str) -> Computed:
        """Give the same update for rows on a device; what δ is formed from stays where it is."""
        return Computed(
            self.shape, self.dtype, lambda w0, some: self.form(w0.cpu(), some).to(device)
        )

    def transposed(self, w0: Tensor) -> Dense:
        """Give the update of W0ᵀ."""
        return Dense(merged(self, w0).T)

    def delta(self, w0: Tensor, some: Some) -> Tensor:
        """Form δ of some rows in float64."""
        return self.form(w0, some)

    def displacement(self, w0: Rows) -> Displacement:
        """Tell how each row moves, from δ."""
        return w0.displacements(self.delta)
