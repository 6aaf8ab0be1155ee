"""Full weights: Hugging Face's layout, in one file or in shards, and single files of trainings."""

from __future__ import annotations

import re
from typing import Any, Self

from wda.checkpoints.checkpoint import Checkpoint
from wda.checkpoints.tensors import Tensors, first_file, open_tensors, read_json
from wda.errors import CheckpointError
from wda.naming import Matrix
from wda.places import Place
from wda.updates import Dense

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model_fsdp.bin",
)


_ENDINGS = (".safetensors", ".bin", ".index.json", ".pt", ".pth", ".ckpt")

# Lightning's names of files: epoch=1-step=200.ckpt, and a version behind when there are several.
_STEP_FILES = re.compile(r"(?:.*\D)?step=(\d+)(?:-.*)?\.ckpt")


class FullCheckpoint(Checkpoint):
    """A whole model: the base itself, or the result of full fine-tuning."""

    layout = "whole model"
    evidence = "a weight file with no sign of an adapter"
    method = "ft"
    step_files = _STEP_FILES

    def __init__(self, path: Place, tensors: Tensors) -> None:
        self.path = path
        self.tensors = tensors
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
    def open(cls, path: Place) -> Self | None:
        """Open a model folder or a single weight file."""
        file = path if path.is_file() else first_file(path, *WEIGHT_FILES)
        if file is None or not file.name.endswith(_ENDINGS):
            return None
        tensors = open_tensors(file)
        if any(".lora_" in name for name in tensors):
            raise CheckpointError(
                f"{file}: holds adapter weights (lora_…) under the name of a whole model and no "
                "adapter_config.json that gives their scaling; save it with save_pretrained()"
            )
        return cls(path, tensors)

    def holds_all(self) -> bool:
        """Tell that an absent matrix is missing: a whole model holds all of them."""
        return True

    def stored_shape(self, module: str, matrix: Matrix) -> tuple[int, int]:
        """Give the shape of the stored weight, brought to (out_features, in_features)."""
        shape = self.tensors[f"{module}.weight"].shape
        if len(shape) != 2:
            raise CheckpointError(
                f"{self.path}: {module} has {len(shape)} dimensions where the base has a matrix"
            )
        rows, features = shape
        return (features, rows) if matrix.stored_transposed else (rows, features)

    def update(self, module: str, matrix: Matrix, rows: slice | None = None) -> Dense:
        """Give Wt as it is stored."""
        return Dense(self.tensors.read_matrix(f"{module}.weight", matrix, rows))

    def tensors_of(self, module: str) -> tuple[str, ...]:
        """Name the weight."""
        return (f"{module}.weight",)
