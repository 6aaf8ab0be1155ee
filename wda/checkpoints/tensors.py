"""A folder's tensors by name: shapes from the headers at once, values when they are asked for.

Reads safetensors, one file or sharded with an index, and PyTorch's own ``.bin`` in the same two
forms. A pickle is only ever unpickled in weights-only mode, which executes nothing it contains.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wda.errors import CheckpointError, listing


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes
    ----------
    shape : tuple of int
        Its shape as stored.
    file : Path
        The file that holds it.
    read : callable
        Gives its values; a view of the mapped file where the format allows.
    """

    shape: tuple[int, ...]
    file: Path
    read: Callable[[], Tensor]


class Tensors(Mapping[str, Entry]):
    """Tensor name → entry, over all files of one checkpoint."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, name: str) -> Tensor:
        """Give the values of one tensor."""
        return self._entries[name].read()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: entry.shape for name, entry in self._entries.items()}

    @property
    def files(self) -> list[Path]:
        """The files the tensors lie in."""
        return sorted({entry.file for entry in self._entries.values()})


def first_file(folder: Path, *names: str) -> Path | None:
    """Give the first of these files that a folder has."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def open_tensors(path: Path) -> Tensors:
    """Open a weight file, or all shards of an index, reading headers only.

    Raises
    ------
    CheckpointError
        When a file is truncated, corrupt or missing, or a pickle holds more than tensors.
    """
    if path.name.endswith(".index.json"):
        return _open_sharded(path)
    return Tensors(_open_file(path))


def _open_sharded(index: Path) -> Tensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map in it; the index is damaged, copy it again")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent}: {len(missing)} of {len(shards)} shards named in {index.name} are "
            f"missing: {listing(missing)}; copy them into this folder"
        )
    entries: dict[str, Entry] = {}
    for shard in shards:
        entries.update(_open_file(index.parent / shard))
    absent = sorted(set(weight_map) - set(entries))
    if absent:
        raise CheckpointError(
            f"{index}: tensors named in it are in no shard: {listing(absent)}; copy it again"
        )
    return Tensors(entries)


def _open_file(path: Path) -> dict[str, Entry]:
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


def _open_safetensors(path: Path) -> dict[str, Entry]:
    try:
        handle: Any = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        _damaged(path, error)

    def entry(name: str) -> Entry:
        shape = tuple(handle.get_slice(name).get_shape())
        return Entry(shape, path, lambda: handle.get_tensor(name))

    return {name: entry(name) for name in handle.keys()}  # noqa: SIM118 - no mapping


def _open_pickle(path: Path) -> dict[str, Entry]:
    try:
        # Only the zip form that PyTorch writes since 1.6 can be mapped.
        mapped = zipfile.is_zipfile(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: this pickle wants to run code, which is never done; only tensors are read; "
            "convert it to safetensors where you trust it"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        _damaged(path, error)
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path}: holds a {type(loaded).__name__}, expected a dictionary of named tensors"
        )

    def entry(tensor: Tensor) -> Entry:
        return Entry(tuple(tensor.shape), path, lambda: tensor)

    return {str(name): entry(value) for name, value in loaded.items() if isinstance(value, Tensor)}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    CheckpointError
        When the file is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _damaged(path, error)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def _damaged(path: Path, error: Exception) -> NoReturn:
    size = path.stat().st_size if path.exists() else 0
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise CheckpointError(
        f"{path}: cannot be read, truncated or corrupt ({size} bytes): {why}; copy it again"
    ) from None
