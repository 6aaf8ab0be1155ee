"""Merges an adapter into its base: a model that needs no adapter any more."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wda.checkpoints import Adapter, FullCheckpoint, Given, open_checkpoint, open_named_base
from wda.checkpoints.given import NOTHING_GIVEN
from wda.errors import (
    CheckpointError,
    OutputError,
    PairingError,
    blaming,
    listing,
)
from wda.files import staged_folder
from wda.locations import resolve
from wda.naming import Matrix, find_matrices, natural_order
from wda.origins import never_saw
from wda.progress import progress_bar
from wda.rows import row_blocks
from wda.safetensors_writing import ToWrite, write_safetensors
from wda.updates import merged

# Numbers of a matrix that are merged at a time, in float64.
_BLOCK_ELEMENTS = 1 << 24

INDEX_FILE = "model.safetensors.index.json"
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".index.json", ".pt", ".pth", ".ckpt", ".gguf", ".h5")

# What peft puts into the names of what is trained whole, and of biases.
_PEFT_WORDS = ("modules_to_save", "base_layer", "default")


@dataclass(frozen=True)
class Merged:
    """What became of one matrix.

    Attributes
    ----------
    module : str
        Path of its module in the base.
    dtype : str
        What it was written as: the base's own dtype.
    relative_update : float
        ‖Wt − W0‖/‖W0‖ of the exact Wt.
    error : float
        ‖written − Wt‖/‖Wt − W0‖: which share of the update was lost to the rounding.
    """

    module: str
    dtype: str
    relative_update: float
    error: float


def merge(
    adapter: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    given: Given = NOTHING_GIVEN,
    progress: bool = True,
) -> list[Merged]:
    """Write the model that an adapter makes of its base, in the base's dtype and shards.

    The product is exact to float64 before it is rounded, and a block of rows is held at a time.

    Parameters
    ----------
    adapter : path or location
        One adapter of any layout.
    out : path
        Folder to be written; what else lies in the base's is copied into it.
    base : path or location, optional
        The model it was trained on; by default what it names itself.
    given : Given
        What the adapter does not say itself.
    progress : bool
        Whether to show a progress bar on standard error.

    Returns
    -------
    list of Merged
        One entry per matrix that changed.

    Raises
    ------
    WdaError
        When something cannot be read, or the merged model would not be what the adapter does.
    """
    with progress_bar(progress) as bar:
        task = bar.add_task("merging", total=None, note="")
        checkpoint, model = _open(adapter, base, given)
        if (why := never_saw(checkpoint, model)) is not None:
            warnings.warn(f"{checkpoint.path}: {why.partition('; ')[0]}", stacklevel=2)
        merging = _Merging(checkpoint, model)
        target = Path(out)
        if target.exists() and target.resolve() == merging.folder.resolve():
            raise OutputError(f"{target}: is the base itself; choose another folder for --out")
        with staged_folder(target) as scratch:
            merging.write(
                scratch,
                lambda done, total, name: bar.update(task, completed=done, total=total, note=name),
            )
    return sorted(merging.done, key=lambda one: natural_order(one.module))


def _open(
    adapter: str | Path, base: str | Path | None, given: Given
) -> tuple[Adapter, FullCheckpoint]:
    """Open the adapter and the base it was trained on."""
    checkpoint = open_checkpoint(resolve(adapter), given)
    if not isinstance(checkpoint, Adapter):
        raise CheckpointError(
            f"{adapter}: is a {checkpoint.layout} and no adapter; there is nothing to merge"
        )
    return checkpoint, open_named_base([checkpoint], base, resolve)[1]


class _Merging:
    """One adapter on its way into one base."""

    def __init__(self, adapter: Adapter, base: FullCheckpoint) -> None:
        self.adapter, self.base = adapter, base
        self._require_plain()
        self.folder = Path(str(base.path)) if Path(str(base.path)).is_dir() else Path()
        self.done: list[Merged] = []
        self._own = self._pair()
        self._matrices = self._changed()
        self._beside, self._new = self._trained_beside()

    def write(self, folder: Path, on_tensor: Callable[[int, int, str], None]) -> None:
        """Write all files of the merged model."""
        shards = self._shards()
        names = {shard: _safetensors_name(shard) for shard in shards}
        count = sum(map(len, shards.values()))
        done = 0
        for shard, held in shards.items():
            pieces = [self._to_write(name) for name in held]
            for piece in pieces:
                done += 1
                on_tensor(done, count, piece.name)
            write_safetensors(folder / names[shard], pieces)
        if len(shards) > 1:
            weight_map = {name: names[shard] for shard, held in shards.items() for name in held}
            size = sum(file.stat().st_size for file in folder.iterdir())
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
        for file in self._others():
            shutil.copy2(file, folder / file.name)

    def _require_plain(self) -> None:
        """Refuse a base whose weights cannot be written back as they were stored."""
        if self.base.quantised:
            raise CheckpointError(
                f"{self.base.path}: is {self.base.quantised}, and merged weights do not fit into "
                "packed numbers; give the unquantised model as --base"
            )
        if self.base.tensors.derived:
            parts = listing(sorted(self.base.tensors.derived), 2)
            raise CheckpointError(
                f"{self.base.path}: holds weights in parts or stacks ({parts}), which cannot be "
                "written back; merge with the adapter's own library"
            )

    def _pair(self) -> dict[str, str]:
        """Give the adapter's own name of every module of the base that it changes."""
        names = self.adapter.names_in(self.base)
        own = {of_base: module for module, of_base in names.items()}
        if len(own) < len(names):
            raise PairingError(
                f"{self.adapter.path}: changes copies of the base's layers, each in its own way; "
                "the merged model has more layers than the base; merge it with peft"
            )
        unknown = sorted(m for m in set(own) - self.base.modules if own[m] in self.adapter.required)
        if unknown:
            raise PairingError(
                f"{self.adapter.path}: changes {listing(unknown, 6)}, which the base "
                f"{self.base.path} does not have; is this the model it was trained on?"
            )
        return own

    def _changed(self) -> dict[str, Matrix]:
        """Give the stored matrices that change, by the name of their tensor."""

        def says_transposed(module: str, stored: tuple[int, int]) -> bool:
            own = self._own.get(module)
            return own is not None and self.adapter.says_transposed(own, stored)

        known = set(self._own) & self.base.modules
        shapes = self.base.tensors.shapes_of(f"{module}.weight" for module in known)
        found = find_matrices(shapes, says_transposed, self.base.config)
        matrices = {f"{matrix.module}.weight": matrix.whole for matrix in found}
        for matrix in matrices.values():
            own = self._own[matrix.module]
            if (shape := self.adapter.stored_shape(own, matrix)) != matrix.stored_shape:
                raise PairingError(
                    f"{self.adapter.path}: {own} is {shape[0]}×{shape[1]}, in the base "
                    f"{matrix.stored_shape[0]}×{matrix.stored_shape[1]} (out×in)"
                )
        return matrices

    def _trained_beside(self) -> tuple[dict[str, str], dict[str, str]]:
        """Give what was trained beside the base's matrices: name in the model → own name.

        First biases and norms that the base has, then the tensors of new modules, such as heads.
        """
        used = {name for module in self._own.values() for name in self.adapter.tensors_of(module)}
        left = [name for name in self.adapter.tensors if name not in used]
        found: dict[str, str] = {}
        new: dict[str, str] = {}
        lost = []
        heads = {
            own: of_base for of_base, own in self._own.items() if of_base not in self.base.modules
        }
        for own, of_base in heads.items():
            new |= {f"{of_base}.weight": name for name in self.adapter.tensors_of(own)}
        for name in left:
            if name in self.adapter.accounted:
                continue  # such as W0, saved beside what was trained
            plain = ".".join(word for word in name.split(".") if word not in _PEFT_WORDS)
            head = next((h for h in heads if plain.endswith(f"{h}.bias")), None)
            in_base = self._name_in_base(name, plain)
            if in_base is not None and in_base not in self._matrices:
                found[in_base] = name
            elif head is not None:
                new[f"{heads[head]}.bias"] = name
            else:
                lost.append(name)
        if lost:
            raise CheckpointError(
                f"{self.adapter.path}: {listing(lost, 4)} have no place in the base "
                f"{self.base.path}; merged without them it would be another model"
            )
        return found, new

    def _name_in_base(self, name: str, plain: str) -> str | None:
        """Find the base's tensor that a tensor's plain name ends in, if it has the same shape."""
        words = plain.split(".")
        for start in range(len(words)):
            candidate = ".".join(words[start:])
            entry = self.base.tensors.get(candidate)
            if entry is not None and entry.shape == self.adapter.tensors[name].shape:
                return candidate
        return None

    def _shards(self) -> dict[str, list[str]]:
        """Give the base's files, and the tensors in each."""
        shards: dict[str, list[str]] = {}
        for name, entry in self.base.tensors.items():
            known = entry.file.name.endswith((".safetensors", ".bin"))
            shards.setdefault(entry.file.name if known else "model.bin", []).append(name)
        shards[max(shards)].extend(self._new)
        return shards

    def _others(self) -> Iterator[Path]:
        """Give the base's other files: configuration, tokeniser, licence."""
        if self.folder == Path():
            return
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and not file.name.endswith(_WEIGHT_ENDINGS):
                yield file

    def _to_write(self, name: str) -> ToWrite:
        if name in self._new:
            head = self.adapter.tensors.read(self._new[name])
            return ToWrite(name, tuple(head.shape), head.dtype, lambda: head)
        entry = self.base.tensors[name]
        dtype = self.base.tensors.read(name, rows=[slice(0, 1)]).dtype
        return ToWrite(name, entry.shape, dtype, lambda: self._values(name, dtype))

    def _values(self, name: str, dtype: torch.dtype) -> Tensor:
        shape = self.base.tensors[name].shape
        if name in self._beside:
            return self.adapter.tensors.read(self._beside[name]).to(dtype)
        if name not in self._matrices:
            return self.base.tensors.read(name)
        matrix = self._matrices[name]
        written = self._merged(matrix, dtype)
        return (written.T if matrix.stored_transposed else written).reshape(shape)

    def _merged(self, matrix: Matrix, dtype: torch.dtype) -> Tensor:
        """Merge one matrix block by block, and measure what its dtype loses."""
        own = self._own[matrix.module]
        blocks: list[slice | None] = [None]
        if not matrix.stored_transposed and not self.adapter.needs_whole(own):
            blocks = list(row_blocks(matrix.shape, _BLOCK_ELEMENTS))
        written, before, update, lost = [], 0.0, 0.0, 0.0
        for rows in blocks:
            with blaming(self.adapter.path):
                w0 = self.base.weight(matrix.module, matrix, rows)
                wt = merged(self.adapter.update(own, matrix, self.base, rows), w0)
            if not torch.isfinite(wt).all():
                raise CheckpointError(
                    f"{self.adapter.path}: {own} merges to NaN or Inf; the training diverged or "
                    "a file is damaged; nothing was written"
                )
            rounded = wt.to(dtype)
            written.append(rounded)
            before += float(w0.double().square().sum())
            update += float((wt - w0.double()).square().sum())
            lost += float((rounded.double() - wt).square().sum())
        name = str(dtype).removeprefix("torch.")
        self.done.append(
            Merged(matrix.module, name, _root_ratio(update, before), _root_ratio(lost, update))
        )
        return torch.cat(written)


def _root_ratio(a: float, b: float) -> float:
    return (a / b) ** 0.5 if b else 0.0


def _safetensors_name(file: str) -> str:
    """Name the merged shard as the base's, in safetensors."""
    stem = file.rpartition(".")[0]
    return f"{stem.replace('pytorch_model', 'model')}.safetensors"
