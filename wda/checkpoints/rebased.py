"""Forms that start from another matrix than W0, because the training did.

Some initialisers take what they put into the factors off the base weight, so that the sum of both
is W0 at first. What was trained is then the start that they left, plus the factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from wda.checkpoints.forms import Around, Decomposed, Factors, Form, Stored, Wanted
from wda.naming import Matrix, pick
from wda.updates import Computed, Some

if TYPE_CHECKING:
    from wda.checkpoints.full import FullCheckpoint


class Start(ABC):
    """The matrix that a training started from.

    Attributes
    ----------
    needs_whole : bool
        Whether some of its rows can be told only from the whole of W0.
    """

    needs_whole: ClassVar[bool] = False

    @property
    @abstractmethod
    def parts(self) -> tuple[Stored, ...]:
        """The tensors it is read from."""

    @property
    @abstractmethod
    def told(self) -> tuple[object, ...]:
        """What it depends on beside them."""

    @abstractmethod
    def read(self, wanted: Wanted) -> Tensor:
        """Give the wanted rows."""


@dataclass(frozen=True)
class StoredStart(Start):
    """A start that is stored, in the checkpoint or in another model."""

    weight: Stored

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The weight."""
        return (self.weight,)

    @property
    def told(self) -> tuple[object, ...]:
        """The state of the file, which may be another model's."""
        return type(self).__name__, self.weight.tensors.state(self.weight.name)

    def read(self, wanted: Wanted) -> Tensor:
        """Give the wanted rows as they are stored."""
        return self.weight.tensors.read_matrix(self.weight.name, wanted.matrix, wanted.rows)


@dataclass(frozen=True)
class WithoutInitial(Start):
    """W0 − s·B·A with the factors that the training started with."""

    initial: Factors

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The two factors."""
        return self.initial.parts

    @property
    def told(self) -> tuple[object, ...]:
        """What the factors depend on."""
        states = (part.tensors.state(part.name) for part in self.parts)
        return type(self).__name__, *self.initial.told, *states

    def read(self, wanted: Wanted) -> Tensor:
        """Take them off, in float32, and round as the library does."""
        w0 = wanted.base.weight(wanted.matrix.module, wanted.matrix, wanted.rows)
        taken = self.initial.update(wanted)
        return _rounded(w0, taken.scaling * taken.B.float() @ taken.A.float())


@dataclass(frozen=True)
class WithoutLeading(Start):
    """W0 without the part that an initialiser computes from it alone.

    Attributes
    ----------
    split : callable
        Gives B and A of that part, of a matrix and a rank: :func:`pissa` or :func:`olora`.
    rank : int
        Their rank.
    scaling : float
        The factor s that they are put under.
    """

    split: Callable[[Tensor, int, float], tuple[Tensor, Tensor]]
    rank: int
    scaling: float

    needs_whole: ClassVar[bool] = True

    @property
    def parts(self) -> tuple[Stored, ...]:
        """No tensor."""
        return ()

    @property
    def told(self) -> tuple[object, ...]:
        """Which part, and of what rank."""
        return type(self).__name__, self.split.__name__, self.rank, self.scaling

    def read(self, wanted: Wanted) -> Tensor:
        """Compute that part of the whole of W0 and take it off."""
        whole = _without_leading(
            self.split, self.rank, self.scaling, wanted.base, wanted.matrix.whole
        )
        return pick(whole, wanted.stored_rows)


# All checkpoints of a run, and all parts of a fused projection, start from the same.
@lru_cache(maxsize=2)
def _without_leading(
    split: Callable[[Tensor, int, float], tuple[Tensor, Tensor]],
    rank: int,
    scaling: float,
    base: FullCheckpoint,
    matrix: Matrix,
) -> Tensor:
    w0 = base.weight(matrix.module, matrix)
    b, a = split(w0.float(), rank, scaling)
    return _rounded(w0, scaling * b @ a)


def pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Give the leading singular vectors as PiSSA puts them into the factors."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return u[:, :rank] @ torch.diag(root), torch.diag(root) @ vh[:rank]


def olora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """Give the leading columns and rows of the QR decomposition, as OLoRA does."""
    q, r = torch.linalg.qr(weight)
    return q[:, :rank], r[:rank]


@dataclass(frozen=True)
class Rebased(Around):
    """What another form makes of a start that is not W0.

    Attributes
    ----------
    inner : Form
        What the training changed.
    start : Start
        What it started from.
    """

    start: Start

    @property
    def words(self) -> str:  # type: ignore[override]
        """What Wt is made of."""
        return f"{self.inner.words} on a changed base"

    @property
    def needs_whole(self) -> bool:  # type: ignore[override]
        """Whether the start is computed from all of W0."""
        return self.start.needs_whole or super().needs_whole

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The tensors of the change, and the start's."""
        return *super().parts, *self.start.parts

    @property
    def told(self) -> tuple[object, ...]:
        """What the change and the start depend on."""
        return *super().told, *self.start.told

    def update(self, wanted: Wanted) -> Computed:
        """Give the update of the start."""
        direction, start = self.inner.update(wanted), self.start.read(wanted)

        def form(w0: Tensor, some: Some) -> Tensor:
            rows = start[some].double()
            return rows - w0 + direction.delta(rows, some)

        return Computed(wanted.shape, direction.dtype, form)

    def held_bytes(self, vectors: int, features: int) -> int:
        """Give the memory of the change, and of the start in float64."""
        return super().held_bytes(vectors, features) + 8 * vectors * features


def started_from(start: Start, form: Form) -> Form:
    """Give the form of the same change to a start that is not W0."""
    if isinstance(form, Decomposed):
        return replace(form, inner=started_from(start, form.inner))
    return Rebased(form, start)


def _rounded(w0: Tensor, taken: Tensor) -> Tensor:
    """Take a float32 matrix off W0, and round to what W0 is stored in."""
    return (w0.float() - taken).to(w0.dtype)
