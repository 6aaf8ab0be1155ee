"""One tensor of a weight file, known by its header, and the file that holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from wda.places import Place


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
        Gives its values; a view of the mapped file where the format allows.
    nbytes : int
        How many bytes of the file it takes.
    """

    shape: tuple[int, ...]
    file: Place
    read: Callable[[], Tensor]
    nbytes: int


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
    """

    place: Place
    entries: Mapping[str, Entry]
    header_bytes: int
