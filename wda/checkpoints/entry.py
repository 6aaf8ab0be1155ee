"""One tensor of a weight file, known by its header, and the file that holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from wda.places import Place
from wda.remote import RemotePlace


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes
    ----------
    shape : tuple of int
        Its shape as stored.
    file : Place
        The file that holds it.
    read : callable
        Gives its values, or those of some rows; a view of the mapped file where the format allows.
    nbytes : int
        How many bytes of the file it takes.
    stored : str
        How and where in the file it is stored, as the header says.
    spacings : callable or None
        Of packed numbers, gives how far apart the levels are around each, as ``read`` gives the
        numbers; None where the dtype says it.
    """

    shape: tuple[int, ...]
    file: Place
    read: Callable[[slice], Tensor]
    nbytes: int
    stored: str
    spacings: Callable[[slice], Tensor] | None = None


@dataclass(frozen=True)
class Derived:
    """A tensor that no file holds as it is, but that is told from others: from packed parts, say.

    Attributes
    ----------
    sources : tuple of str
        Names of the stored tensors it is told from.
    make : callable
        Gives its entry, given theirs in this order.
    """

    sources: tuple[str, ...]
    make: Callable[[Sequence[Entry]], Entry]


@dataclass(frozen=True)
class WeightFile:
    """A weight file that was opened.

    Attributes
    ----------
    place : Place
        Where it lies.
    entries : mapping
        Tensor name → entry.
    header_bytes : int
        What was read of it to know its entries.
    state : tuple
        What tells it from another at the same place, when it was opened.
    metadata : mapping
        What its header says beside the tensors.
    """

    place: Place
    entries: Mapping[str, Entry]
    header_bytes: int
    state: tuple[object, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def under(self, prefix: str) -> WeightFile:
        """Give it with longer names of its tensors."""
        return replace(self, entries={prefix + name: of for name, of in self.entries.items()})


def entry_of(tensor: Tensor, file: Place) -> Entry:
    """Give the entry of a tensor that was loaded, or mapped, from a file."""
    tensor = tensor.detach()  # a parameter is saved as one
    where = f"{tensor.dtype} {tensor.storage_offset()} {tensor.stride()}"
    return Entry(
        tuple(tensor.shape), file, lambda rows: some_of(tensor, rows), tensor.nbytes, where
    )


def some_of(tensor: Tensor, rows: slice) -> Tensor:
    """Give some rows of a tensor; a number has none."""
    return tensor[rows] if tensor.ndim else tensor


def state_of(place: Place) -> tuple[object, ...]:
    """Give place, size, time of change and number of a file; of one elsewhere, size and mark."""
    if isinstance(place, RemotePlace):
        if place.local is None:
            return str(place), place.stat().st_size, place.mark
        place = place.local
    path = Path(str(place))
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ino
