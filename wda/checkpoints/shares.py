"""Forms of projections that one layout fuses and another does not, or whose rows it reorders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wda.checkpoints.forms import Form, Stored, Wanted
from wda.naming import pick
from wda.updates import LowRank

Rows = tuple[range, ...]


@dataclass(frozen=True)
class BlockDiagonal(Form):
    """W0 + s·B·A of a fused projection whose parts have factors of their own.

    Attributes
    ----------
    A, B : Stored
        The factors of all parts one behind the other, seen as (parts·rank, in) and (rows, rank).
    blocks : tuple of tuple of range
        Which output features the update of each part goes to.
    out_features : int
        How many the projection has, with those of parts that have no factors.
    scaling : float
        The factor s.
    """

    A: Stored
    B: Stored
    blocks: tuple[Rows, ...]
    out_features: int
    scaling: float

    words: ClassVar[str] = "factors of parts"

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The two tensors."""
        return self.A, self.B

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.A.shape[1]

    @property
    def rank(self) -> int:
        """Rank of the factors of one part."""
        return self.B.shape[1]

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.scaling

    @property
    def told(self) -> tuple[object, ...]:
        """The factor, and where the parts lie."""
        return *super().told, self.blocks, self.out_features

    def update(self, wanted: Wanted) -> LowRank:
        """Give W0 + s·B·A, with B's blocks where their parts lie and zeros elsewhere."""
        return LowRank(self.A.read(), pick(self._spread(), wanted.stored_rows), self.scaling)

    def _spread(self) -> Tensor:
        b, start = self.B.read(), 0
        spread = torch.zeros(self.out_features, self.A.shape[0], dtype=b.dtype)
        for column, block in zip(range(0, self.A.shape[0], self.rank), self.blocks, strict=True):
            for piece in block:
                stop = start + len(piece)
                spread[piece.start : piece.stop, column : column + self.rank] = b[start:stop]
                start = stop
        return spread

    def held_bytes(self, vectors: int, features: int) -> int:
        """Give the memory of the factors, which are widened to float64."""
        return 8 * self.A.shape[0] * (features + vectors)
