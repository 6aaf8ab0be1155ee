"""Forms of projections that one layout fuses and another does not, or whose rows it reorders."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from wda.checkpoints.entry import Derived, Entry
from wda.checkpoints.forms import Around, Form, Stored, Wanted
from wda.checkpoints.tensors import Tensors
from wda.naming import pick
from wda.updates import LowRank, Update

Rows = tuple[range, ...]


@dataclass(frozen=True)
class Reordered(Stored):
    """A tensor of a file whose rows are wanted in another order, or not all of them.

    Attributes
    ----------
    order : tuple of range
        Which of its rows come one behind the other.
    """

    order: Rows = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return sum(map(len, self.order)), super().shape[1]

    @property
    def told(self) -> tuple[object, ...]:
        """What its values depend on beside those in the file."""
        return *super().told, self.order

    def read(self, rows: Sequence[slice] | None = None) -> Tensor:
        """Give its values in this order, or some of its rows."""
        picked = [slice(some.start, some.stop, some.step) for some in self.order]
        whole = pick(super().read(), picked)
        return whole if rows is None else pick(whole, rows)


@dataclass(frozen=True)
class Share(Around):
    """Some of the output features of another form, in an order of their own.

    Attributes
    ----------
    inner : Form
        The form that holds all of them.
    rows : tuple of range
        Which of its output features these are.
    """

    rows: Rows

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """(out_features, in_features)."""
        return sum(map(len, self.rows)), self.inner.shape[1]

    @property
    def told(self) -> tuple[object, ...]:
        """What the form it is of depends on, and which rows these are."""
        return *super().told, self.rows

    def placed(self, wanted: Wanted) -> Share:  # noqa: ARG002
        """Give the share with its rows, where the base has to tell them."""
        return self

    def update(self, wanted: Wanted) -> Update:
        """Read the update of those rows of the other form."""
        whole = replace(
            wanted.matrix,
            stored_transposed=False,
            stored_shape=(self.inner.shape[0] or 0, wanted.matrix.stored_shape[1]),
            part=self.rows,
        )
        pieces = [piece for some in wanted.stored_rows for piece in whole.rows_of_stored(some)]
        part = tuple(range(piece.start, piece.stop, piece.step or 1) for piece in pieces)
        return self.inner.update(Wanted(replace(whole, part=part), wanted.base))


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

    def factors_of(self, rows: Sequence[slice]) -> tuple[Tensor, Tensor]:
        """Give A and B of some output features, without the parts that change none of them."""
        every = range(self.out_features)
        wanted = {row for some in rows for row in every[some]}
        columns = [
            part * self.rank + column
            for part, block in enumerate(self.blocks)
            if any(not wanted.isdisjoint(piece) for piece in block)
            for column in range(self.rank)
        ]
        return self.A.read()[columns], pick(self._spread(), rows)[:, columns]

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


def behind(sizes: Mapping[str, int]) -> dict[str, Rows]:
    """Lay parts of these sizes one behind the other.

    Examples
    --------
    >>> behind({"query": 4, "value": 2})
    {'query': (range(0, 4),), 'value': (range(4, 6),)}
    """
    found: dict[str, Rows] = {}
    start = 0
    for label, size in sizes.items():
        found[label] = (range(start, start + size),)
        start += size
    return found


def unstacked(tensors: Tensors, names: Callable[[str, int], str | None]) -> Tensors:
    """Give the slices of stacked tensors names of their own.

    Parameters
    ----------
    tensors : Tensors
        All tensors.
    names : callable
        Gives the name of a tensor's slice of a number; None where it is no stack.
    """
    derived: dict[str, Derived] = {}
    stacks = [name for name in tensors if names(name, 0) is not None]
    for name in stacks:
        whole = tensors.told(name) or Derived((name,), lambda entries: entries[0])
        for index in range(tensors[name].shape[0]):
            of_slice = Derived(whole.sources, partial(_slice_of, index, whole))
            derived[str(names(name, index))] = of_slice
    return tensors.with_derived(derived, stacks) if derived else tensors


def _slice_of(index: int, whole: Derived, sources: Sequence[Entry]) -> Entry:
    return slice_of(index, whole.make(sources))


def slice_of(index: int, entry: Entry) -> Entry:
    """Give the entry of a slice of a tensor that stacks several."""
    one, apart = slice(index, index + 1), entry.spacings
    return Entry(
        entry.shape[1:],
        entry.file,
        lambda rows: entry.read(one)[0][rows],
        math.prod(entry.shape[1:]) * (entry.nbytes // max(math.prod(entry.shape), 1)),
        f"{entry.stored} [{index}]",
        None if apart is None else lambda rows: apart(one)[0][rows],
    )
