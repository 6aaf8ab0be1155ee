"""Folders of PyTorch's distributed checkpoints: shards of every process, and where each lies.

``.metadata`` is a pickle of a few record classes. It is read into records of our own, and whatever
else it names is refused. A shard is a tensor as PyTorch saves one, inside of ``….distcp``.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from wda.checkpoints.entry import Derived, Entry, WeightFile, some_of, state_of
from wda.checkpoints.state_dicts import tensors_within, without_wrappers
from wda.checkpoints.tensors import Tensors, damaged
from wda.errors import CheckpointError, listing

METADATA_FILE = ".metadata"


class _Record:
    """An object of one of PyTorch's record classes, with its fields and no behaviour."""

    def __init__(self) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __getattr__(self, name: str) -> Any:
        return None


_METADATA = "torch.distributed.checkpoint.metadata"
_BUILT: Mapping[tuple[str, str], Callable[..., Any]] = {
    **{
        (_METADATA, name): _Record
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    (_METADATA, "_MEM_FORMAT_ENCODING"): int,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib", "WindowsPath"): PurePosixPath,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
}


# What a pickle that is cut or changed may end in.
_OF_DAMAGE = (ValueError, TypeError, AttributeError, IndexError, KeyError)


class _OtherClassError(pickle.UnpicklingError):
    """A pickle names what is not among the record classes."""


class _Unpickler(pickle.Unpickler):
    """Builds records, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _BUILT:
            return _BUILT[module, name]
        if name == "MCoreMetadata" and module.startswith("megatron.core.dist_checkpointing"):
            return _Record  # Megatron's, which has one field more
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise _OtherClassError(f"{module}.{name}")


def open_distributed(path: Path) -> Tensors:
    """Open a folder by its ``.metadata``; of the shards, only those of the model are told of.

    Raises
    ------
    CheckpointError
        When files are missing or damaged, or it holds more than tensors.
    """
    metadata = _read_metadata(path)
    stored = _model_names(metadata, path)
    shards = _shards(metadata, set(stored.values()), path)
    entries: dict[Path, dict[str, Entry]] = {}
    derived = {}
    for name, key in without_wrappers(stored, path).items():
        found = metadata.state_dict_metadata[key]
        for shard in shards[key]:
            entries.setdefault(shard.file, {})[shard.name] = shard.entry()
        corners = tuple(tuple(shard.corner) for shard in shards[key])
        names = tuple(shard.name for shard in shards[key])
        derived[name] = Derived(names, _joining(tuple(found.size), corners))
    files = [WeightFile(file, held, 0, state_of(file)) for file, held in entries.items()]
    where = {name: file.place for file in files for name in file.entries}
    return Tensors(where, path, files, derived)


class _Shard:
    """A part of a tensor: the file it lies in and where, and where in the tensor it belongs."""

    def __init__(self, name: str, place: _Record, chunk: _Record, dtype: torch.dtype, path: Path):
        if (named := str(place.relative_path)) != PurePosixPath(named).name:
            raise CheckpointError(
                f"{path}: names {named}, which is no file beside it and is not read; the shards "
                "of a distributed checkpoint lie in its folder"
            )
        self.file = path.parent / named
        self.start, self.length = int(place.offset), int(place.length)
        self.corner, self.shape = tuple(chunk.offsets), tuple(chunk.sizes)
        self.dtype, self.name = dtype, f"{name} from {self.corner}"
        if place.transform_descriptors:
            raise CheckpointError(
                f"{self.file}: its tensors are packed with {listing(place.transform_descriptors)}; "
                "only unpacked ones are read; convert it with "
                "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
            )

    def entry(self) -> Entry:
        """Give its entry in the file."""
        size = self.dtype.itemsize * torch.Size(self.shape).numel()
        return Entry(self.shape, self.file, self.read, size, f"{self.dtype} {self.start}")

    def read(self, rows: slice) -> Tensor:
        """Read it, or some of its rows."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.start)
                item = io.BytesIO(file.read(self.length))
            tensor = torch.load(item, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
            damaged(self.file, error)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != self.shape:
            raise CheckpointError(
                f"{self.file}: holds no tensor of shape {self.shape} at byte {self.start}, where "
                f"{METADATA_FILE} says {self.name}; the files are of different checkpoints"
            )
        return some_of(tensor.detach(), rows)


def _joining(
    shape: tuple[int, ...], corners: Sequence[tuple[int, ...]]
) -> Callable[[Sequence[Entry]], Entry]:
    """Tell how the shards of a tensor are put together."""

    def make(shards: Sequence[Entry]) -> Entry:
        def read(rows: slice) -> Tensor:
            if not shape:
                return shards[0].read(rows)
            first, last, _ = rows.indices(shape[0])
            pieces = []
            for shard, corner in zip(shards, corners, strict=True):
                start, stop = max(first - corner[0], 0), min(last - corner[0], shard.shape[0])
                if start < stop:
                    pieces.append((corner, start, shard.read(slice(start, stop))))
            if len(pieces) == 1 and tuple(pieces[0][2].shape[1:]) == shape[1:]:
                return pieces[0][2]
            dtype = pieces[0][2].dtype if pieces else torch.float32
            whole = torch.empty((last - first, *shape[1:]), dtype=dtype)
            for corner, start, piece in pieces:
                begins = (corner[0] + start - first, *corner[1:])
                into = zip(begins, piece.shape, strict=True)
                whole[tuple(slice(begin, begin + size) for begin, size in into)] = piece
            return whole

        size = sum(shard.nbytes for shard in shards)
        stored = f"{shards[0].stored.split()[0]} {[shard.stored for shard in shards]} {corners}"
        return Entry(shape, shards[0].file, read, size, stored)

    return make


def _read_metadata(path: Path) -> _Record:
    try:
        with path.open("rb") as file:
            metadata: _Record = _Unpickler(file).load()
    except _OtherClassError as error:
        raise CheckpointError(
            f"{path}: names {error}, which is no part of the description of a distributed "
            "checkpoint; nothing it contains is run"
        ) from None
    except (pickle.UnpicklingError, OSError, EOFError, *_OF_DAMAGE) as error:
        damaged(path, error)
    described = isinstance(metadata, _Record) and metadata.state_dict_metadata
    if not isinstance(described, dict) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path}: describes no tensors; copy the whole checkpoint again")
    return metadata


def _model_names(metadata: _Record, path: Path) -> dict[str, str]:
    """Find the model's tensors: their names → the names they are stored by.

    The nesting that was saved is built anew, with tensors that have a shape and no values.
    """
    tree: dict[str, Any] = {}
    of_tensor: dict[int, str] = {}
    for key, found in metadata.state_dict_metadata.items():
        *folders, last = (metadata.planner_data or {}).get(key, (key,))
        level = tree
        for folder in folders:
            level = level.setdefault(str(folder), {})
        if found.size is not None:
            level[str(last)] = torch.empty(found.size, device="meta")
            of_tensor[id(level[str(last)])] = key
    return {name: of_tensor[id(tensor)] for name, tensor in tensors_within(tree, path).items()}


def _corner(offsets: Sequence[int] | None) -> tuple[int, ...]:
    """Give where a shard begins; of one that begins with the tensor it may not be told."""
    return tuple(offsets) if offsets and any(offsets) else ()


def _shards(metadata: _Record, wanted: set[str], path: Path) -> dict[str, list[_Shard]]:
    """Give the shards of the wanted tensors, and make sure that they are complete."""
    places = {
        (index.fqn, _corner(index.offset)): place for index, place in metadata.storage_data.items()
    }
    found: dict[str, list[_Shard]] = {}
    for key in sorted(wanted):
        tensor = metadata.state_dict_metadata[key]
        absent = [c for c in tensor.chunks if (key, _corner(c.offsets)) not in places]
        filled = sum(torch.Size(chunk.sizes).numel() for chunk in tensor.chunks)
        if absent or filled != torch.Size(tensor.size).numel():
            raise CheckpointError(
                f"{path}: shards of {key} are missing; copy the whole checkpoint again"
            )
        dtype = tensor.properties.state[0]
        chunks = sorted(tensor.chunks, key=lambda chunk: tuple(chunk.offsets))
        found[key] = [
            _Shard(key, places[key, _corner(chunk.offsets)], chunk, dtype, path) for chunk in chunks
        ]
    files = {shard.file for shards in found.values() for shard in shards}
    if missing := sorted(file.name for file in files if not file.is_file()):
        raise CheckpointError(
            f"{path.parent}: {len(missing)} of {len(files)} files named in {path.name} are "
            f"missing: {listing(missing)}; copy them into this folder"
        )
    return found
