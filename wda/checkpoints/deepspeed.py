"""DeepSpeed's checkpoints: the model's weights as its optimiser holds them, joined again.

Under ZeRO the weights in float32 lie in the files of the optimiser, flat and one part per process;
the model's own file has their names and shapes. Stages 1 and 2 cut the whole vector of a group of
parameters, stage 3 every parameter. Without the optimiser's files, stages 0 to 2 still hold the
model's copy, mostly of 16 bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wda.checkpoints.entry import Derived, Entry, WeightFile, entry_of, state_of
from wda.checkpoints.pickles import load_pickle
from wda.checkpoints.state_dicts import without_wrappers
from wda.checkpoints.tensors import Tensors
from wda.errors import CheckpointError, listing

MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
LATEST_FILE = "latest"

_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_")
_FLAT = ("single_partition_of_fp32_groups", "fp32_flat_groups")


@dataclass(frozen=True)
class _Piece:
    """Some elements of a flat tensor that one process holds."""

    name: str
    start: int
    stop: int


def open_deepspeed(path: Path) -> Tensors:
    """Open a checkpoint by its model's file.

    Raises
    ------
    CheckpointError
        When it is of several model-parallel processes, or files of it are missing.
    """
    folder = path.parent
    if others := sorted(f.name for f in folder.iterdir() if re.search(r"mp_rank_0*[1-9]", f.name)):
        raise CheckpointError(
            f"{folder}: was trained with its matrices cut over several processes "
            f"({listing(others, 2)}); join them with deepspeed's ds_to_universal or by the "
            "training's own export, and give the result"
        )
    states = [load_pickle(file) for file in _of_all_ranks(folder, "_model_states.pt") or [path]]
    optimizers = _of_all_ranks(folder, "_optim_states.pt")
    groups = [load_pickle(file).get("optimizer_state_dict", {}) for file in optimizers]
    cut = path.name == MODEL_FILES[1]
    if not groups or not any(key in groups[0] for key in _FLAT):
        return _whole(path, states[0], cut)
    count = groups[0].get("partition_count")
    count = max(count) if isinstance(count, list) else count
    if len(groups) != count or (cut and len(states) != count):
        raise CheckpointError(
            f"{folder}: was written by {count} processes, and has {len(groups)} files of "
            f"optimisers and {len(states)} of models; copy the whole checkpoint again"
        )
    flat: dict[Path, dict[str, Entry]] = {path: {}}
    for rank, (file, group) in enumerate(zip(optimizers, groups, strict=True)):
        vectors = group[_FLAT[cut]]
        flat[file] = {f"rank {rank} {i}": entry_of(v, file) for i, v in enumerate(vectors)}
    sizes = [[len(vector) for vector in group[_FLAT[cut]]] for group in groups]
    pieces = _pieces_of_3(states[0], sizes) if cut else _pieces_of_2(states[0], groups[0], sizes)
    derived = {
        name: Derived(tuple(p.name for p in some), _joined(shape, some))
        for name, shape, some in pieces
    }
    for other, name in states[0].get("shared_params", {}).items():
        derived[other] = derived[name]
    frozen, derived_frozen = _frozen(states, derived, path)
    flat[path] |= frozen
    files = [WeightFile(file, entries, 0, state_of(file)) for file, entries in flat.items()]
    where = {name: file.place for file in files for name in file.entries}
    return Tensors(where, path, files, without_wrappers({**derived, **derived_frozen}, path))


def _whole(path: Path, state: Mapping[str, Any], cut: bool) -> Tensors:
    """Give the model's own copy of the weights."""
    held = state.get("module")
    if cut or not isinstance(held, dict):
        raise CheckpointError(
            f"{path}: holds no weights, which lie in the files of the optimisers "
            "(…_optim_states.pt) under ZeRO-3; copy them into this folder"
        )
    tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    entries = without_wrappers({n: entry_of(t, path) for n, t in tensors.items()}, path)
    return Tensors(
        dict.fromkeys(entries, path), path, [WeightFile(path, entries, 0, state_of(path))]
    )


def _pieces_of_2(
    state: Mapping[str, Any], group: Mapping[str, Any], sizes: Sequence[Sequence[int]]
) -> Iterator[tuple[str, tuple[int, ...], list[_Piece]]]:
    """Tell where the parameters lie, one behind the other, over the parts of all processes."""
    paddings = group.get("param_alignment_paddings") or [None] * len(state["param_shapes"])
    for i, (shapes, padding) in enumerate(zip(state["param_shapes"], paddings, strict=True)):
        offset = 0
        for j, (name, shape) in enumerate(shapes.items()):
            stop = offset + math.prod(shape)
            parts = [(f"rank {rank} {i}", of_rank[i]) for rank, of_rank in enumerate(sizes)]
            yield name, tuple(shape), _between(parts, offset, stop)
            offset = stop + (padding[j] if padding else 0)


def _pieces_of_3(
    state: Mapping[str, Any], sizes: Sequence[Sequence[int]]
) -> Iterator[tuple[str, tuple[int, ...], list[_Piece]]]:
    """Tell where the parts of every parameter lie, at the same place with every process."""
    offset = 0
    for shapes in state["param_shapes"]:
        for name, shape in shapes.items():
            share = math.ceil(math.prod(shape) / len(sizes))
            pieces = []
            for rank, of_rank in enumerate(sizes):
                parts = [(f"rank {rank} {i}", size) for i, size in enumerate(of_rank)]
                pieces += _between(parts, offset, offset + share)
            yield name, tuple(shape), pieces
            offset += share


def _between(parts: Sequence[tuple[str, int]], start: int, stop: int) -> list[_Piece]:
    """Give the elements from start to stop of parts that lie one behind the other."""
    found, passed = [], 0
    for name, size in parts:
        first, last = max(start - passed, 0), min(stop - passed, size)
        if first < last:
            found.append(_Piece(name, first, last))
        passed += size
    return found


def _frozen(
    states: Sequence[Mapping[str, Any]], trained: Collection[str], path: Path
) -> tuple[dict[str, Entry], dict[str, Derived]]:
    """Give what was not trained, which the models' files hold themselves."""
    entries: dict[str, Entry] = {}
    derived: dict[str, Derived] = {}
    shapes: Mapping[str, Any] = states[0].get("frozen_param_shapes") or {}
    for name, shape in shapes.items():
        fragments = [state["frozen_param_fragments"][name].flatten() for state in states]
        pieces = [_Piece(f"{name} of {rank}", 0, len(part)) for rank, part in enumerate(fragments)]
        for piece, part in zip(pieces, fragments, strict=True):
            entries[piece.name] = entry_of(part, path)
        derived[name] = Derived(tuple(p.name for p in pieces), _joined(tuple(shape), pieces))
    # Stages 1 and 2 keep what is not trained, and all keep buffers, with the copy of the model.
    for name, value in states[0]["module"].items():
        if name not in trained and name not in shapes and isinstance(value, Tensor):
            entries[name] = entry_of(value, path)
    return entries, derived


def _joined(shape: tuple[int, ...], pieces: Sequence[_Piece]) -> Callable[[Sequence[Entry]], Entry]:
    """Tell how a parameter is put together; stage 3 fills its last part up."""

    def make(flat: Sequence[Entry]) -> Entry:
        def read(rows: slice) -> Tensor:
            parts = [
                entry.read(slice(piece.start, piece.stop))
                for entry, piece in zip(flat, pieces, strict=True)
            ]
            whole = torch.cat(parts)[: math.prod(shape)].view(shape)
            return whole[rows] if shape else whole

        dtype, width = flat[0].stored.split()[0], flat[0].nbytes // max(flat[0].shape[0], 1)
        where = [(entry.stored, piece) for entry, piece in zip(flat, pieces, strict=True)]
        return Entry(shape, flat[0].file, read, width * math.prod(shape), f"{dtype} {where}")

    return make


def _of_all_ranks(folder: Path, ending: str) -> list[Path]:
    """Give the files of all processes, in their order."""
    ranks = {
        int(m[1]): f
        for f in folder.iterdir()
        if (m := _RANK.search(f.name)) and f.name.endswith(ending)
    }
    return [ranks[rank] for rank in sorted(ranks)]
