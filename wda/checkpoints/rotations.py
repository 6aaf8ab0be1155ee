"""Forms that multiply W0: rotations of its input features, and one factor per feature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wda.checkpoints.forms import Axis, Form, Stored, Wanted
from wda.errors import CheckpointError
from wda.naming import pick
from wda.updates import Computed, Some


@dataclass(frozen=True)
class Cayley:
    """How a skew-symmetric matrix Q becomes a rotation: (I − Q)·(I + Q)⁻¹.

    Attributes
    ----------
    coefficients : tuple of float or None
        Those of I, Q, Q², … where the library sums a series instead of solving.
    bound : float or None
        The largest norm of Q over all blocks, where it is constrained.
    """

    coefficients: tuple[float, ...] | None = None
    bound: float | None = None

    def rotations(self, skew: Tensor) -> Tensor:
        """Give the rotation of every block, shape (blocks, size, size)."""
        if self.bound is not None:
            largest = self.bound / math.sqrt(len(skew))
            norm = torch.linalg.matrix_norm(skew, keepdim=True)
            skew = torch.where(norm <= largest, skew, skew * (largest / norm))
        identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
        if self.coefficients is None:
            rotated: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
            return rotated
        power, summed = identity.expand_as(skew), torch.zeros_like(skew)
        for coefficient in self.coefficients:
            summed = summed + coefficient * power
            power = power @ skew
        return summed


@dataclass(frozen=True)
class Rotated(Form):
    """κ ⊙ (W0·Rᵀ) with rotations of neighbouring input features: OFT and BOFT.

    Attributes
    ----------
    generators : Stored
        What Q is made of: its upper triangles, (blocks, size·(size − 1)/2); or matrices X with
        Q = (X − Xᵀ)/2, (…, blocks, size, size). One block alone serves all features.
    cayley : Cayley
        How Q becomes a rotation.
    row_scale : Stored or None
        κ, one number per output feature.
    """

    generators: Stored
    cayley: Cayley
    row_scale: Stored | None = None

    words: ClassVar[str] = "rotations"

    @property
    def parts(self) -> tuple[Stored, ...]:
        """What the rotations are made of, and κ."""
        return (self.generators,) if self.row_scale is None else (self.generators, self.row_scale)

    @property
    def shape(self) -> tuple[int | None, None]:
        """(out_features, None), out_features where there is κ."""
        return None if self.row_scale is None else math.prod(self.row_scale.shape), None

    @property
    def told(self) -> tuple[object, ...]:
        """How Q becomes a rotation, too."""
        return *super().told, self.cayley

    def update(self, wanted: Wanted) -> Computed:
        """Give the update of the wanted rows, each of which is rotated alone."""
        stored = self.generators.tensors.read(self.generators.name, again=True)
        rotations = self.cayley.rotations(_skew(stored.double()))
        features, size = wanted.shape[1], rotations.shape[-1]
        # BOFT rotates several times, OFT once.
        turns = rotations.reshape(stored.shape[0] if stored.ndim > 3 else 1, -1, size, size)
        blocks = turns.shape[1]
        if features != size * blocks and (blocks > 1 or features % size):
            raise CheckpointError(
                f"{self.generators.name}: rotates {blocks} blocks of {size} features, but "
                f"the base's {wanted.matrix} has {features}; is this the model it was trained on?"
            )
        turns = turns - torch.eye(size, dtype=torch.float64)
        kappa = None if self.row_scale is None else _rows_of(self.row_scale, wanted)

        def form(w0: Tensor, some: Some) -> Tensor:
            delta = torch.zeros_like(w0)
            for level, turn in enumerate(turns):
                order = _woven(features, size, level)
                delta = delta + _turned(w0 + delta, turn, order)
            if kappa is None:
                return delta
            return (kappa[some, None] - 1) * w0 + kappa[some, None] * delta

        return Computed(wanted.shape, stored.dtype, form)


@dataclass(frozen=True)
class Scaled(Form):
    """W0 with one factor per output or input feature: (IA)³.

    Attributes
    ----------
    factors : Stored
        κ; of a convolution one number per channel.
    axis : {"output", "input"}
        What it has one number of.
    from_one : bool
        Whether κ − 1 is stored.
    """

    factors: Stored
    axis: Axis
    from_one: bool = False

    @property
    def words(self) -> str:  # type: ignore[override]
        """What Wt is made of."""
        return f"a factor per {self.axis} feature"

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The factors."""
        return (self.factors,)

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """(out_features, None); the input features of a convolution are more than its factors."""
        return math.prod(self.factors.shape) if self.axis == "output" else None, None

    @property
    def told(self) -> tuple[object, ...]:
        """The axis, too, and what is stored."""
        return *super().told, self.axis, self.from_one

    def update(self, wanted: Wanted) -> Computed:
        """Give κ ⊙ W0 or W0 ⊙ κ."""
        dtype, less = self.factors.read().dtype, 0.0 if self.from_one else 1.0
        if self.axis == "output":
            grown = _rows_of(self.factors, wanted) - less
            return Computed(wanted.shape, dtype, lambda w0, some: grown[some, None] * w0)
        channels, features = math.prod(self.factors.shape), wanted.shape[1]
        if features % channels:
            raise CheckpointError(
                f"{self.factors.name}: has {channels} factors, but the base's {wanted.matrix} has "
                f"{features} input features; is this the model it was trained on?"
            )
        grown = self.factors.read().double().flatten() - less
        grown = grown.repeat_interleave(features // channels)
        return Computed(wanted.shape, dtype, lambda w0, _some: grown * w0)


def _rows_of(stored: Stored, wanted: Wanted) -> Tensor:
    """Give a number for each of the wanted rows."""
    return pick(stored.read().double().flatten(), wanted.stored_rows)


def _turned(rows: Tensor, turn: Tensor, order: Tensor) -> Tensor:
    """Give what a rotation adds to rows whose features lie in an order of their own for it."""
    blocks = rows[:, order.argsort()].reshape(len(rows), -1, turn.shape[-1])
    added = torch.einsum("nrk,rck->nrc", blocks, turn.expand(blocks.shape[1], -1, -1))
    return added.flatten(1)[:, order]


def _woven(features: int, size: int, level: int) -> Tensor:
    """Order features as a butterfly of a level does: halves of blocks, every other one first."""
    if level == 0:
        return torch.arange(features)
    halves = torch.arange(features).reshape(-1, 2 << level, size // 2)
    return torch.cat([halves[:, ::2], halves[:, 1::2]], dim=1).flatten()


def _skew(generators: Tensor) -> Tensor:
    """Make skew-symmetric matrices of upper triangles, or of whole matrices."""
    if generators.ndim > 2:
        whole = generators.flatten(0, -3)
        return (whole - whole.mT) / 2
    blocks, count = generators.shape
    size = (1 + math.isqrt(1 + 8 * count)) // 2
    rows, columns = torch.triu_indices(size, size, 1)
    upper = torch.zeros(blocks, size, size, dtype=generators.dtype)
    upper[:, rows, columns] = generators
    return upper - upper.mT
