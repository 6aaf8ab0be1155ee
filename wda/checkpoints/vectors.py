"""Forms of factors with vectors between and beside them: AdaLoRA's and VeRA's."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from wda.checkpoints.forms import Factors, Form, Stored, Wanted
from wda.naming import align, pick
from wda.updates import LowRank

if TYPE_CHECKING:
    from wda.checkpoints.full import FullCheckpoint


@dataclass(frozen=True)
class SingularFactors(Factors):
    """W0 + s·B·diag(E)·A: AdaLoRA.

    Attributes
    ----------
    E : Stored
        What stands between the factors, (rank, 1).
    """

    E: Stored

    words: ClassVar[str] = "factors and singular values"

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The three."""
        return self.A, self.B, self.E

    def update(self, wanted: Wanted) -> LowRank:
        """Give the update of the wanted rows."""
        a = self.E.read().double() * self.A.read().double()
        return LowRank(a, self.B.read(wanted.stored_rows), self.scaling)


class Projections(ABC):
    """The random A (rank, largest in) and B (largest out, rank) that all modules share."""

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The tensors they are read from."""
        return ()

    @property
    def told(self) -> tuple[object, ...]:
        """What they depend on beside them."""
        return ()

    @abstractmethod
    def read(self, base: FullCheckpoint) -> tuple[Tensor, Tensor]:
        """Give A and B."""


@dataclass(frozen=True)
class StoredProjections(Projections):
    """Projections that the checkpoint holds."""

    A: Stored
    B: Stored

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The two."""
        return self.A, self.B

    def read(self, base: FullCheckpoint) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Read them."""
        return self.A.read(), self.B.read()


@dataclass(frozen=True)
class DrawnProjections(Projections):
    """Projections that were not saved, drawn again from their key.

    Attributes
    ----------
    rank : int
        Their rank.
    key : int
        The seed they are drawn with.
    modules : tuple of (str, int)
        All modules that share them, with their output features; the largest give the shapes.
    """

    rank: int
    key: int
    modules: tuple[tuple[str, int], ...]

    @property
    def told(self) -> tuple[object, ...]:
        """The key, and the modules whose shapes in the base count."""
        return self.rank, self.key, self.modules

    def read(self, base: FullCheckpoint) -> tuple[Tensor, Tensor]:
        """Draw them as peft does."""
        rename = align((module for module, _ in self.modules), base.modules)
        features = [
            math.prod(base.tensors[f"{rename(module)}.weight"].shape) // out
            for module, out in self.modules
        ]
        return _drawn(self.rank, self.key, max(out for _, out in self.modules), max(features))


@lru_cache(maxsize=4)
def _drawn(rank: int, key: int, out: int, features: int) -> tuple[Tensor, Tensor]:
    """Draw A and B as Kaiming's uniform initialisation does, A first."""
    generator = torch.Generator().manual_seed(key)

    def draw(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return draw(rank, features), draw(out, rank)


@dataclass(frozen=True)
class SharedFactors(Form):
    """W0 + diag(b)·B·diag(d)·A with projections that all modules share: VeRA.

    Attributes
    ----------
    b, d : Stored
        One number per output feature, and one per rank.
    projections : Projections
        A and B, of which a module takes as many columns and rows as it has features.
    """

    b: Stored
    d: Stored
    projections: Projections

    words: ClassVar[str] = "vectors on shared factors"

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The vectors, and the projections where they are stored."""
        return self.b, self.d, *self.projections.parts

    @property
    def shape(self) -> tuple[int, None]:
        """(out_features, None)."""
        return math.prod(self.b.shape), None

    @property
    def rank(self) -> int:
        """Rank of the projections."""
        return math.prod(self.d.shape)

    @property
    def told(self) -> tuple[object, ...]:
        """Where the projections come from, too."""
        return *super().told, *self.projections.told

    def update(self, wanted: Wanted) -> LowRank:
        """Give the update of the wanted rows."""
        projection_a, projection_b = self.projections.read(wanted.base)
        a = self.d.read().double().reshape(-1, 1) * projection_a[:, : wanted.shape[1]].double()
        b = self.b.read().double().reshape(-1, 1) * projection_b[: self.shape[0]].double()
        return LowRank(a, pick(b, wanted.stored_rows), 1.0)

    def held_bytes(self, vectors: int, features: int) -> int:
        """Give the memory of the factors."""
        return 8 * self.rank * (features + vectors)
