"""A remote file or folder with the face of a path, and what a store has to offer for that."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from wda.errors import LocationError
from wda.remote.fetch import fetch


class Store(ABC):
    """Where remote files lie; a file or folder in it is named by a key with slashes."""

    @abstractmethod
    def url(self, key: str) -> str:
        """Give the location of a key as the user would write it, without secrets."""

    @abstractmethod
    def children(self, key: str) -> Mapping[str, int | None] | None:
        """Give what lies in a folder, name → size, None for a folder; None if no one can tell."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Give a file's size in bytes; None if there is no such file."""

    @abstractmethod
    def piece(self, key: str, start: int, into: memoryview) -> int:
        """Read from ``start`` on and give how many bytes came, which may be fewer than asked.

        Raises
        ------
        TemporaryError
            When asking again may help.
        LocationError
            When it will not, or the file is no longer the one whose size and mark were told.
        """

    def mark(self, key: str) -> str | None:  # noqa: ARG002
        """Give what the store says that identifies a file's content, such as its ETag."""
        return None

    def local(self, key: str) -> Path | None:  # noqa: ARG002
        """Give a copy of the file that this machine has already."""
        return None


@dataclass(frozen=True)
class RemotePlace:
    """A :class:`wda.places.Place` that is not on this machine."""

    store: Store
    key: str

    def __str__(self) -> str:
        return self.store.url(self.key)

    @property
    def name(self) -> str:
        """Last part of its path."""
        return PurePosixPath(self.key).name

    @property
    def suffix(self) -> str:
        """Ending of its name, with the dot."""
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> RemotePlace:
        """The folder it lies in."""
        return RemotePlace(self.store, self.key.rpartition("/")[0])

    def __truediv__(self, name: str, /) -> RemotePlace:
        return RemotePlace(self.store, f"{self.key}/{name}" if self.key else name)

    def is_file(self) -> bool:
        """Tell whether it is a file that exists."""
        return self.store.size(self.key) is not None

    def is_dir(self) -> bool:
        """Tell whether it is a folder; where none can be listed, whatever is no file may be one."""
        children = self.store.children(self.key)
        return not self.is_file() if children is None else bool(children)

    @property
    def listable(self) -> bool:
        """Whether the store can tell what lies in a folder."""
        return self.store.children(self.key) is not None

    def iterdir(self) -> Iterator[RemotePlace]:
        """Give what lies in the folder; nothing where the store cannot list."""
        return (self / name for name in self.store.children(self.key) or ())

    def stat(self) -> os.stat_result:
        """Give the size; a store has no more to tell."""
        return os.stat_result((0o100444, 0, 0, 0, 0, 0, self._size(), 0, 0, 0))

    def read_text(self, encoding: str | None = None) -> str:
        """Give the whole file as text; for small ones."""
        if (copy := self.local) is not None:
            return copy.read_text(encoding)
        return str(self.read(0, self._size()), encoding or "utf-8")

    def read(self, start: int, stop: int) -> bytearray:
        """Give a range of the file's bytes, a large one in parts that travel side by side.

        Raises
        ------
        LocationError
            When it cannot be had, also after asking again.
        """
        return fetch(self.store.piece, self.key, start, stop, str(self))

    @property
    def mark(self) -> str | None:
        """What the store says that identifies the file's content, such as its ETag."""
        return self.store.mark(self.key)

    @property
    def local(self) -> Path | None:
        """A copy of the file that this machine has already."""
        return self.store.local(self.key)

    def _size(self) -> int:
        size = self.store.size(self.key)
        if size is None:
            raise LocationError(f"{self}: no such file; is the location right?")
        return size


def remote_place(store: Store, key: str) -> RemotePlace:
    """Give a place in a store, after making sure that it is there, where that can be told."""
    place = RemotePlace(store, key)
    if place.listable and not place.is_file() and not place.is_dir():
        raise LocationError(f"{place}: no such file or folder; check its name")
    return place
