"""Updates that hold Wt as it is, or can only compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from wda.decomposition import Displacement
from wda.floors import Rounding, of_spacings, of_storage
from wda.rows import Rows
from wda.updates.update import Some, from_products, merged


@dataclass(frozen=True)
class Dense:
    """Wt as a stored matrix: full fine-tuning, or any weight that was merged.

    Attributes
    ----------
    weight : Tensor
        Wt.
    spacings : Tensor or None
        How far apart the stored levels are around each number, where they are packed numbers;
        None where the dtype says it.
    """

    weight: Float[Tensor, "vectors features"]
    spacings: Float[Tensor, "vectors features"] | None = None

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
        return Dense(self.weight.to(device), moved_to(device, self.spacings))

    def transposed(self, w0: Tensor) -> Dense:  # noqa: ARG002
        """Give the update of W0ᵀ."""
        return Dense(self.weight.T, turned(self.spacings))

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

    def rounding(self, w0: Rows) -> Rounding:
        """Tell how far each row would move by the rounding of Wt."""
        return rounding_of_weights(w0, self.dtype, self.spacings)


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
    spacings : Tensor or None
        How far apart the levels of the weights were that it started from, where these are packed
        numbers and W0 are others.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    form: Callable[[Tensor, Some], Tensor]
    spacings: Float[Tensor, "vectors features"] | None = None

    factors: ClassVar[tuple[Tensor, ...]] = ()
    ends: ClassVar[tuple[Tensor, ...]] = ()

    def to(self, device: str) -> Computed:
        """Give the same update for rows on a device; what δ is formed from stays where it is."""
        return Computed(
            self.shape,
            self.dtype,
            lambda w0, some: self.form(w0.cpu(), some).to(device),
            moved_to(device, self.spacings),
        )

    def transposed(self, w0: Tensor) -> Dense:
        """Give the update of W0ᵀ."""
        return Dense(merged(self, w0).T, turned(self.spacings))

    def delta(self, w0: Tensor, some: Some) -> Tensor:
        """Form δ of some rows in float64."""
        return self.form(w0, some)

    def displacement(self, w0: Rows) -> Displacement:
        """Tell how each row moves, from δ."""
        return w0.displacements(self.delta)

    def rounding(self, w0: Rows) -> Rounding:
        """Tell how far each row would move by rounding, as if Wt were stored in its dtype."""
        return rounding_of_weights(w0, self.dtype, self.spacings)


def rounding_of_weights(w0: Rows, dtype: torch.dtype, spacings: Tensor | None) -> Rounding:
    """Tell how far each row would move by the rounding of weights to a dtype or to levels."""
    return of_storage(w0, dtype) if spacings is None else of_spacings(w0, spacings)


def moved_to(device: str, numbers: Tensor | None) -> Tensor | None:
    """Give numbers on a device, where there are any."""
    return None if numbers is None else numbers.to(device)


def turned(numbers: Tensor | None) -> Tensor | None:
    """Give numbers of a matrix for its transpose, where there are any."""
    return None if numbers is None else numbers.T
