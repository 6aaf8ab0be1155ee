"""Pipelines of diffusers: a folder with one folder for each model of it."""

from __future__ import annotations

from typing import Self

from wda.checkpoints.found import Found
from wda.checkpoints.full import FullCheckpoint
from wda.checkpoints.tensors import Tensors
from wda.errors import CheckpointError

_INDEX_FILE = "model_index.json"


class PipelineCheckpoint(FullCheckpoint):
    """All models of a pipeline, their modules under the names of their folders."""

    layout = "pipeline of diffusers"
    evidence = "model_index.json beside folders with weights"

    @classmethod
    def open(cls, found: Found) -> Self | None:
        """Open a pipeline's folder."""
        if not found.is_folder or found.file is not None:
            return None
        tensors = Tensors({}, found.path)
        # An entry without a library is a part that the pipeline does without.
        for part, kind in found.json(_INDEX_FILE).items():
            if isinstance(kind, list) and all(kind):
                of_part = Found(found.path / part).tensors
                tensors = tensors.joined(of_part.under(f"{part}."))
        if not tensors and found.has(_INDEX_FILE):
            raise CheckpointError(
                f"{found.path}: no folder named in {_INDEX_FILE} has weights; download the whole "
                "pipeline, or give the folder of one of its models"
            )
        return cls(found, tensors) if tensors else None
