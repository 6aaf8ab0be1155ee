"""A folder's tensors by name: shapes from the headers at once, values when they are asked for.

Reads safetensors, one file or sharded with an index, and PyTorch's own pickles (``.bin``, ``.pt``,
``.ckpt``) in the same two forms, whatever a training wrapped around the tensors. A pickle is only
ever unpickled in weights-only mode, which executes nothing it contains.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wda.checkpoints.entry import Derived, Entry, WeightFile, entry_of, some_of, state_of
from wda.checkpoints.pickles import load_pickle
from wda.checkpoints.remote_safetensors import nbytes_of, open_remote_safetensors
from wda.checkpoints.state_dicts import tensors_within, without_wrappers
from wda.errors import CheckpointError, listing
from wda.naming import Matrix, pick
from wda.places import Place
from wda.remote import RemotePlace, at_once

# A tensor that fuses several matrices is kept until their turns are over: two, for the next one
# may already be read when the last part of the one before is taken.
_MOST_KEPT = 2

ALL = slice(None)


class Tensors(Mapping[str, Entry]):
    """Tensor name → entry, over all files of one checkpoint; files are opened when they are needed.

    Parameters
    ----------
    where : mapping
        Tensor name → the file it lies in.
    source : Place
        What says so, for messages.
    opened : iterable of WeightFile
        Files that are open already.
    derived : mapping
        Name → tensor that is told from others, which then have no name of their own.
    """

    def __init__(
        self,
        where: Mapping[str, Place],
        source: Place,
        opened: Iterable[WeightFile] = (),
        derived: Mapping[str, Derived] = MappingProxyType({}),
    ) -> None:
        self._where, self._source = dict(where), source
        self._opened = {file.place: file for file in opened}
        self._derived = dict(derived)
        self._made: dict[str, Entry] = {}
        hidden = {name for one in self._derived.values() for name in one.sources}
        self._names = dict.fromkeys([*(n for n in where if n not in hidden), *self._derived])
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Entry:
        if (derived := self._derived.get(name)) is None:
            return self._stored(name)
        if name not in self._made:
            self.open([name])
            self._made[name] = derived.make([self._stored(source) for source in derived.sources])
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def _stored(self, name: str) -> Entry:
        if (place := self._where[name]) not in self._opened:
            self.open([name])
        return self._opened[place].entries[name]

    def _places(self, name: str) -> list[Place]:
        """Give the files that a tensor, or what it is told from, lies in."""
        sources = self._derived[name].sources if name in self._derived else (name,)
        return list(dict.fromkeys(self._where[source] for source in sources))

    @property
    def derived(self) -> frozenset[str]:
        """Names of those that are told from others."""
        return frozenset(self._derived)

    def told(self, name: str) -> Derived | None:
        """Give what a tensor is told from; None where a file holds it."""
        return self._derived.get(name)

    def with_derived(self, derived: Mapping[str, Derived], without: Container[str] = ()) -> Tensors:
        """Give these with some told from others, and without some that were."""
        both = {n: one for n, one in self._derived.items() if n not in without} | {**derived}
        return Tensors(self._where, self._source, self._opened.values(), both)

    def open(self, names: Iterable[str]) -> None:
        """Open the files that hold these tensors, reading their headers side by side.

        Raises
        ------
        CheckpointError
            When a file cannot be read or lacks a tensor that should be in it.
        """
        needed = dict.fromkeys(place for name in names for place in self._places(name))
        for file in at_once(_open_file, [place for place in needed if place not in self._opened]):
            self._opened[file.place] = file
        absent = sorted(
            name
            for name, place in self._where.items()
            if place in needed and name not in self._opened[place].entries
        )
        if absent:
            raise CheckpointError(
                f"{self._source}: tensors named in it are in no shard: {listing(absent)}; "
                "copy it again"
            )

    def joined(self, other: Tensors) -> Tensors:
        """Give these and another file's together."""
        files = [*self._opened.values(), *other._opened.values()]
        return Tensors({**self._where, **other._where}, self._source, files, self._derived)

    def under(self, prefix: str) -> Tensors:
        """Give these under longer names, after opening all their files."""
        self.open(self)
        where = {prefix + name: place for name, place in self._where.items()}
        return Tensors(where, self._source, [file.under(prefix) for file in self._opened.values()])

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the headers of the opened files say beside the tensors."""
        return {key: word for file in self._opened.values() for key, word in file.metadata.items()}

    def read(self, name: str, again: bool = False, rows: Sequence[slice] = (ALL,)) -> Tensor:
        """Give the values of one tensor, or of some of its rows.

        Parameters
        ----------
        name : str
            The tensor's name.
        again : bool
            Whether it will soon be asked for again, as one that fuses several matrices is; it is
            then kept for a while, so that it travels once.
        rows : sequence of slice
            The rows wanted; of a tensor that lies elsewhere no others are fetched.
        """
        entry = self[name]
        far = isinstance(entry.file, RemotePlace)
        if not (far and again):
            read = at_once(entry.read, rows) if far else list(map(entry.read, rows))
            return read[0] if len(read) == 1 else torch.cat(read)
        with self._lock:
            if name not in self._kept:
                self._kept[name] = entry.read(ALL)
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
            return pick(self._kept[name], rows)

    def read_matrix(self, name: str, matrix: Matrix, rows: slice | None = None) -> Tensor:
        """Give a stored weight as (out_features, in_features), or some rows of that.

        Parameters
        ----------
        name : str
            The tensor's name.
        matrix : Matrix
            How it is stored, and which part of it is wanted.
        rows : slice, optional
            Rows of that part.
        """
        if matrix.stored_transposed:
            whole = matrix.take(self.read(name, again=matrix.part is not None))
            return whole if rows is None else whole[rows]
        return laid_flat(self.read(name, rows=matrix.rows_of_stored(rows)))

    def is_remote(self, name: str) -> bool:
        """Tell whether a tensor lies on another machine."""
        return any(
            isinstance(place, RemotePlace) and place.local is None for place in self._places(name)
        )

    def shapes_of(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Shape of some of the tensors; files that hold none of them stay closed."""
        wanted = list(names)
        self.open(wanted)
        return {name: self[name].shape for name in wanted}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return self.shapes_of(self)

    @property
    def files(self) -> list[Place]:
        """The files that were opened."""
        return sorted(self._opened, key=str)

    def state(self, name: str) -> tuple[object, ...]:
        """Give what the file that holds a tensor was like when it was opened."""
        self.open([name])
        return tuple(fact for place in self._places(name) for fact in self._opened[place].state)

    @property
    def sizes(self) -> tuple[object, ...]:
        """Give the sizes of the files on this machine, when they were opened."""
        here = (file for file in self.files if not isinstance(file, RemotePlace))
        return tuple(self._opened[file].state[1] for file in here)

    def require_unchanged(self, names: Iterable[str]) -> None:
        """Make sure that the files of these tensors, as far as they are here, are as they were.

        Raises
        ------
        CheckpointError
            When one has changed or is gone.
        """
        for place in dict.fromkeys(place for name in names for place in self._places(name)):
            if isinstance(place, RemotePlace):
                continue  # what is read of it is of the file that was opened, or is refused
            try:
                changed = state_of(place) != self._opened[place].state
            except FileNotFoundError:
                raise CheckpointError(
                    f"{place}: was deleted while it was read; compare again without it"
                ) from None
            if changed:
                raise CheckpointError(
                    f"{place}: changed while it was read; compare again when it is written"
                )

    @property
    def header_bytes(self) -> int:
        """What was read of those files to know their tensors."""
        return sum(file.header_bytes for file in self._opened.values())


def first_file(folder: Place, *names: str) -> Place | None:
    """Give the first of these files that a folder has."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def is_index(path: Place) -> bool:
    """Tell whether a file is the index of shards, of a variant (``.index.fp16.json``) or not."""
    return re.search(r"\.index(?:\.\w+)?\.json$", path.name) is not None


def open_tensors(path: Place) -> Tensors:
    """Open a weight file, or the shards of an index, reading headers only.

    Shards that lie elsewhere are opened when a tensor in them is asked for.

    Raises
    ------
    CheckpointError
        When a file is truncated, corrupt or missing, or a pickle holds more than tensors.
    """
    if is_index(path):
        return _open_sharded(path)
    file = _open_file(path)
    return Tensors(dict.fromkeys(file.entries, file.place), path, [file])


def _open_sharded(index: Place) -> Tensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map in it; the index is damaged, copy it again")
    names = sorted(set(map(str, weight_map.values())))
    if outside := [name for name in names if name != PurePath(name).name]:
        raise CheckpointError(
            f"{index}: names shards that are no files beside it, and they are not read: "
            f"{listing(outside, 4)}; a shard lies in the folder of its index"
        )
    shards = {name: index.parent / name for name in names}
    # Where nothing can be listed, asking for every shard would be to open it.
    if not isinstance(index, RemotePlace) or index.listable:
        missing = [shard for shard, place in shards.items() if not place.is_file()]
        if missing:
            raise CheckpointError(
                f"{index.parent}: {len(missing)} of {len(shards)} shards named in {index.name} "
                f"are missing: {listing(missing)}; copy them into this folder"
            )
    by_name = without_wrappers(weight_map, index)
    tensors = Tensors({name: shards[shard] for name, shard in by_name.items()}, index)
    if not isinstance(index, RemotePlace):
        tensors.open(tensors)
    return tensors


def _open_file(place: Place) -> WeightFile:
    file = _open_as_stored(place)
    return replace(file, entries=without_wrappers(file.entries, place))


def _open_as_stored(place: Place) -> WeightFile:
    path = place.local if isinstance(place, RemotePlace) else place
    safe = place.suffix == ".safetensors"
    if isinstance(path, Path):
        # A copy in the Hub's cache goes by the name it was asked for.
        opened = _open_safetensors(path) if safe else _open_pickle(path)
        return replace(opened, place=place)
    assert isinstance(place, RemotePlace)
    if safe:
        return open_remote_safetensors(place)
    raise CheckpointError(
        f"{place}: a pickle can be read only whole ({place.stat().st_size} bytes) and not in "
        "parts; convert it to safetensors, or download it and give its path"
    )


def _open_safetensors(path: Path) -> WeightFile:
    try:
        state = state_of(path)
        handle: Any = safe_open(path, framework="pt")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        damaged(path, error)
    metadata = header.pop("__metadata__", None) or {}

    def entry(name: str, item: dict[str, Any]) -> Entry:
        shape, dtype, first = tuple(item["shape"]), item["dtype"], item["data_offsets"][0]
        size = nbytes_of(dtype, shape)
        return Entry(
            shape,
            path,
            lambda rows: some_of(handle.get_tensor(name), rows),
            size,
            f"{dtype} {first}",
        )

    entries = {name: entry(name, header[name]) for name in header}
    return WeightFile(path, entries, 8 + length, state, metadata)


def _open_pickle(path: Path) -> WeightFile:
    try:
        state = state_of(path)
        loaded = load_pickle(path)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        damaged(path, error)
    held = tensors_within(loaded, path)
    return WeightFile(path, {n: entry_of(tensor, path) for n, tensor in held.items()}, 0, state)


def laid_flat(tensor: Tensor) -> Tensor:
    """Lay the kernel of a convolution flat: (out, in, kh, kw) becomes (out, in·kh·kw)."""
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def read_json(path: Place) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    CheckpointError
        When the file is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        damaged(path, error)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def damaged(path: Place, error: Exception) -> NoReturn:
    """Refuse a file that cannot be read.

    Raises
    ------
    CheckpointError
        Always, with what was wrong.
    """
    size = path.stat().st_size if path.is_file() else 0
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise CheckpointError(
        f"{path}: cannot be read, truncated or corrupt ({size} bytes): {why}; copy it again"
    ) from None
