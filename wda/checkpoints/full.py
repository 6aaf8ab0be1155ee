"""Full weights: Hugging Face's layout, in one file or in shards, and single files of trainings."""

from __future__ import annotations

import math
import re
from typing import Any, Self

from torch import Tensor

from wda.checkpoints.checkpoint import Checkpoint
from wda.checkpoints.entry import Entry
from wda.checkpoints.found import Found
from wda.checkpoints.levels import spacings_of
from wda.checkpoints.tensors import Tensors, read_json
from wda.errors import CheckpointError
from wda.naming import Matrix
from wda.updates import Dense

# Lightning's names of files: epoch=1-step=200.ckpt, and a version behind when there are several.
_STEP_FILES = re.compile(r"(?:.*\D)?step=(\d+)(?:-.*)?\.ckpt")

# How safetensors and PyTorch call integers.
_INTEGERS = re.compile(r"[IU]\d+ |BOOL |torch\.(?:u?int|bool)")


class FullCheckpoint(Checkpoint):
    """A whole model: the base itself, or the result of full fine-tuning."""

    layout = "whole model"
    evidence = "a weight file with no sign of an adapter"
    step_files = _STEP_FILES

    def __init__(self, found: Found, tensors: Tensors) -> None:
        super().__init__(found.path, tensors, "ft", found.given)
        self.quantised = found.quantised
        self._config: dict[str, Any] | None = None
        # By name alone: to know which of them are vectors, every shard would have to be opened.
        self.modules = frozenset(
            name.removesuffix(".weight") for name in tensors if name.endswith(".weight")
        )

    @property
    def config(self) -> dict[str, Any]:
        """Its ``config.json``, read when it is first asked for; empty where there is none."""
        if self._config is None:
            file = self.path / "config.json"
            known = self.path.is_dir() and file.is_file()
            self._config = read_json(file) if known else {}
        return self._config

    @classmethod
    def open(cls, found: Found) -> Self | None:
        """Open a model folder or a single weight file."""
        if found.file is None:
            return None
        if any(".lora_" in name for name in found.tensors):
            raise CheckpointError(
                f"{found.file}: holds adapter weights (lora_…) under the name of a whole model and "
                "no adapter_config.json that gives their scaling; save it with save_pretrained()"
            )
        return cls(found, found.tensors)

    def holds_all(self) -> bool:
        """Tell that an absent matrix is missing: a whole model holds all of them."""
        return True

    def stored_shape(self, module: str, matrix: Matrix) -> tuple[int, int]:
        """Give the shape of the stored weight, brought to (out_features, in_features)."""
        shape = self._entry(module).shape
        if len(shape) < 2:
            raise CheckpointError(f"{self.path}: {module} is a vector where the base has a matrix")
        rows, features = shape[0], math.prod(shape[1:])
        return (features, rows) if matrix.stored_transposed else (rows, features)

    def _entry(self, module: str) -> Entry:
        """Give the entry of a weight, which has to be of floating-point numbers."""
        entry = self.tensors[f"{module}.weight"]
        if _INTEGERS.match(entry.stored):
            raise CheckpointError(
                f"{self.path}: the weight of {module} is stored in integers "
                f"({entry.stored.split()[0]}), packed in a way that is not read; write the weights "
                "themselves with the library that packed them, and give those"
            )
        return entry

    def weight(self, module: str, matrix: Matrix, rows: slice | None = None) -> Tensor:
        """Read a weight as (out_features, in_features), or some rows of it."""
        self._entry(module)
        return self.tensors.read_matrix(f"{module}.weight", matrix, rows)

    def update(
        self,
        module: str,
        matrix: Matrix,
        base: FullCheckpoint,
        rows: slice | None = None,
    ) -> Dense:
        """Give Wt as it is stored."""
        spacings = spacings_of(self.tensors, f"{module}.weight", matrix, rows)
        if spacings is None:
            spacings = spacings_of(base.tensors, f"{matrix.module}.weight", matrix, rows)
        return Dense(self.weight(module, matrix, rows), spacings)

    def tensors_of(self, module: str) -> tuple[str, ...]:
        """Name the weight."""
        return (f"{module}.weight",)
