"""The forms in which adapters store what they change: one form per module, the algebra behind it.

A layout reads names, shapes and scalings, and says which form each module has; the form turns them
into an update. Shapes are those of matrices (out_features, in_features), with the kernel of a
convolution laid flat as (out, in·kh·kw).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from wda.checkpoints.levels import spacings_of
from wda.checkpoints.tensors import Tensors, laid_flat
from wda.naming import Matrix, pick
from wda.updates import (
    Computed,
    Dense,
    LowRank,
    Some,
    Update,
    WeightDecomposed,
    column_scale,
    column_scaled,
)

if TYPE_CHECKING:
    from wda.checkpoints.full import FullCheckpoint

Axis = Literal["output", "input"]


@dataclass(frozen=True)
class Stored:
    """A tensor of a file, seen as a matrix.

    Attributes
    ----------
    tensors : Tensors
        The file's.
    name : str
        Its name in there.
    turned : bool
        Whether the file holds its transpose.
    """

    tensors: Tensors
    name: str
    turned: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns), the kernel of a convolution laid flat; a vector is one column."""
        first, *others = self.tensors[self.name].shape or (1,)
        rows, columns = first, math.prod(others)
        return (columns, rows) if self.turned else (rows, columns)

    @property
    def told(self) -> tuple[object, ...]:
        """What its values depend on beside those in the file."""
        return (self.turned,)

    def read(self, rows: Sequence[slice] | None = None) -> Tensor:
        """Give its values, or some of its rows."""
        if rows is not None and len(rows) == 1 and not self.turned:
            return laid_flat(self.tensors.read(self.name, rows=rows))
        # Scattered rows are picked from the whole, which travels once.
        whole = laid_flat(self.tensors.read(self.name, again=True))
        whole = whole.T if self.turned else whole
        return whole if rows is None else pick(whole, rows)


@dataclass(frozen=True)
class Wanted:
    """The matrix of the base, or some of its rows, that an update is asked for.

    Attributes
    ----------
    matrix : Matrix
        The matrix.
    base : FullCheckpoint
        The model it belongs to.
    rows : slice or None
        Rows of the matrix.
    """

    matrix: Matrix
    base: FullCheckpoint
    rows: slice | None = None

    @property
    def stored_rows(self) -> list[slice]:
        """Which rows of the stored matrix, seen as (out, in), are wanted."""
        return self.matrix.rows_of_stored(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of what is wanted."""
        rows = len(range(*(self.rows or slice(None)).indices(self.matrix.shape[0])))
        return rows, self.matrix.shape[1]

    def whole_w0(self) -> Tensor:
        """Read the whole stored matrix as (out, in), also where a part or some rows are wanted."""
        return self.base.weight(self.matrix.module, self.matrix.whole)


class Form(ABC):
    """How the change of one module is stored.

    Attributes
    ----------
    words : str
        What Wt is made of, for people.
    needs_whole : bool
        Whether an update of some rows can be told only from the whole of W0.
    """

    words: ClassVar[str]
    needs_whole: ClassVar[bool] = False

    @property
    @abstractmethod
    def parts(self) -> tuple[Stored, ...]:
        """The tensors it is stored in."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int | None, int | None]:
        """(out_features, in_features) of what it changes; None where only the base knows."""

    @property
    def rank(self) -> int | None:
        """Rank of its factors."""
        return None

    @property
    def scale(self) -> float | None:
        """The factor s in front."""
        return None

    @property
    def told(self) -> tuple[object, ...]:
        """What the update depends on beside the tensors, and the shape they have to fit."""
        return (type(self).__name__, self.scale, tuple(part.told for part in self.parts))

    @abstractmethod
    def update(self, wanted: Wanted) -> Update:
        """Read the update of the wanted rows."""

    def held_bytes(self, vectors: int, features: int) -> int:
        """Give the memory that the update of so many rows takes, in float64."""
        return 8 * vectors * features


@dataclass(frozen=True)
class Whole(Form):
    """A weight trained whole, beside an adapter."""

    weight: Stored

    words: ClassVar[str] = "the weight itself"

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The weight."""
        return (self.weight,)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), as far as it is not stored transposed."""
        return self.weight.shape

    def update(self, wanted: Wanted) -> Dense:
        """Give Wt as it is stored."""
        tensors, where = self.weight.tensors, (self.weight.name, wanted.matrix, wanted.rows)
        return Dense(tensors.read_matrix(*where), spacings_of(tensors, *where))


@dataclass(frozen=True)
class Difference(Form):
    """Wt − W0 as a stored matrix."""

    delta: Stored

    words: ClassVar[str] = "a difference"

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The difference."""
        return (self.delta,)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.delta.shape

    def update(self, wanted: Wanted) -> Computed:
        """Give W0 + Δ."""
        delta = self.delta.read(wanted.stored_rows)

        def form(_w0: Tensor, some: Some) -> Tensor:
            return delta[some].double()

        return Computed(wanted.shape, delta.dtype, form)


@dataclass(frozen=True)
class Factors(Form):
    """W0 + s·B·A.

    Attributes
    ----------
    A, B : Stored
        The factors, seen as (rank, in) and (out, rank).
    scaling : float
        The factor s.
    """

    A: Stored
    B: Stored
    scaling: float

    words: ClassVar[str] = "factors"

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The two factors."""
        return self.A, self.B

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.scaling

    def update(self, wanted: Wanted) -> LowRank:
        """Give W0 + s·B·A of the wanted rows; A serves all of them, and is read once."""
        return LowRank(self.A.read(), self.B.read(wanted.stored_rows), self.scaling)

    def held_bytes(self, vectors: int, features: int) -> int:
        """Give the memory of the factors, which are widened to float64."""
        return 8 * self.rank * (features + vectors)


@dataclass(frozen=True)
class Nothing(Form):
    """W0 itself: the direction of a module that trains its magnitude alone.

    Attributes
    ----------
    magnitude : Stored
        The magnitude, of which it takes dtype and number of output features.
    """

    magnitude: Stored

    words: ClassVar[str] = "nothing"

    @property
    def parts(self) -> tuple[Stored, ...]:
        """No tensor."""
        return ()

    @property
    def shape(self) -> tuple[int, None]:
        """(out_features, None)."""
        return math.prod(self.magnitude.shape), None

    def update(self, wanted: Wanted) -> LowRank:
        """Give an update of rank 0."""
        (rows, features), dtype = wanted.shape, self.magnitude.read().dtype
        A, B = torch.empty(0, features, dtype=dtype), torch.empty(rows, 0, dtype=dtype)
        return LowRank(A, B, scaling=0.0)

    def held_bytes(self, vectors: int, features: int) -> int:  # noqa: ARG002
        """Give none."""
        return 0


@dataclass(frozen=True)
class Around(Form):
    """A form that makes something more of another one.

    Attributes
    ----------
    inner : Form
        The other.
    """

    inner: Form

    @property
    def words(self) -> str:  # type: ignore[override]
        """What Wt is made of."""
        return self.inner.words

    @property
    def needs_whole(self) -> bool:  # type: ignore[override]
        """Whether the inner form needs the whole of W0."""
        return self.inner.needs_whole

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The inner form's tensors."""
        return self.inner.parts

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """(out_features, in_features)."""
        return self.inner.shape

    @property
    def rank(self) -> int | None:
        """Rank of the inner form's factors."""
        return self.inner.rank

    @property
    def scale(self) -> float | None:
        """The inner form's factor s."""
        return self.inner.scale

    @property
    def told(self) -> tuple[object, ...]:
        """What the inner form depends on."""
        return *super().told, *self.inner.told

    def held_bytes(self, vectors: int, features: int) -> int:
        """Give the memory of the inner form's update."""
        return self.inner.held_bytes(vectors, features)


@dataclass(frozen=True)
class Decomposed(Around):
    """m ⊙ V/‖V‖, where another form gives V from W0: DoRA.

    Attributes
    ----------
    inner : Form
        What gives V.
    magnitude : Stored
        m, one number per output feature, or per input feature or input channel.
    axis : {"output", "input"}
        Which of the two.
    """

    magnitude: Stored
    axis: Axis = "output"

    @property
    def words(self) -> str:  # type: ignore[override]
        """What Wt is made of."""
        across = "" if self.axis == "output" else " per input"
        if isinstance(self.inner, Nothing):
            return f"magnitude{across} alone"
        return f"{self.inner.words} and magnitude{across}"

    @property
    def needs_whole(self) -> bool:  # type: ignore[override]
        """Whether the lengths it divides by go over all rows."""
        return self.axis == "input" or self.inner.needs_whole

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The inner form's tensors, and the magnitude."""
        return *super().parts, self.magnitude

    @property
    def told(self) -> tuple[object, ...]:
        """What the inner form depends on, and the axis."""
        return *super().told, self.axis

    def update(self, wanted: Wanted) -> Update:
        """Give the direction's update, scaled to the magnitudes."""
        direction = self.inner.update(wanted)
        if self.axis == "output":
            magnitude = pick(self.magnitude.read().flatten(), wanted.stored_rows)
            return WeightDecomposed(direction, magnitude)
        whole = Wanted(wanted.matrix.whole, wanted.base)
        scale = column_scale(
            self.inner.update(whole), self.magnitude.read().flatten(), wanted.whole_w0()
        )
        return column_scaled(direction, scale)
