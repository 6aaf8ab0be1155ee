"""What tensors lie in: weight files with or without an index, and folders of other trainers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from wda.checkpoints.deepspeed import LATEST_FILE, MODEL_FILES, open_deepspeed
from wda.checkpoints.distributed import METADATA_FILE, open_distributed
from wda.checkpoints.gguf import ENDING, open_gguf
from wda.checkpoints.tensors import Tensors, first_file, open_tensors
from wda.errors import CheckpointError, listing
from wda.places import Place

# Accelerate and NeMo put the model's distributed checkpoint into a folder of the training's.
_DISTRIBUTED = (
    METADATA_FILE,
    f"pytorch_model_fsdp_0/{METADATA_FILE}",
    f"weights/{METADATA_FILE}",
)
_ONLY = "-00001-of-00001"
_RANK_FILE = "pytorch_model_fsdp_rank0.bin"
# A model of llama.cpp, a variant of Hugging Face's, or torchtune's only shard, which has no index:
# files of any name between these.
_SINGLE = (
    f"*{ENDING}",
    "model.safetensors.index.*.json",
    "pytorch_model.bin.index.*.json",
    "model.*.safetensors",
    "pytorch_model.*.bin",
    f"*model{_ONLY}.bin",
    f"*model{_ONLY}.safetensors",
)
_STEP = re.compile(r"global_step\d+")


def container_in(folder: Place) -> Place | None:
    """Give the file by which a folder of another trainer is opened; None where there is none.

    Raises
    ------
    CheckpointError
        When ``latest`` names a step that is not there.
    """
    if (file := first_file(folder, *_DISTRIBUTED, *MODEL_FILES, _RANK_FILE)) is not None:
        return file
    if isinstance(folder, Path) and (files := _single_files(folder)):
        if len(files) > 1:
            raise CheckpointError(
                f"{folder}: holds several models: {listing([f.name for f in files], 4)}; give the "
                "file that is meant"
            )
        return files[0]
    if not (folder / LATEST_FILE).is_file():
        return None
    step = (folder / LATEST_FILE).read_text(encoding="utf-8").strip()
    if not _STEP.fullmatch(step):
        return None
    if (file := first_file(folder / step, *MODEL_FILES)) is None:
        raise CheckpointError(
            f"{folder / LATEST_FILE}: names {step}, which is not there or has no "
            f"{MODEL_FILES[0]}; give the folder of the step that is meant"
        )
    return file


def _single_files(folder: Path) -> list[Path]:
    """Give the files of a folder that each are a model, without the shards that an index names."""
    found = (file for pattern in _SINGLE for file in sorted(folder.glob(pattern)))
    return [file for file in found if "-of-" not in file.name.replace(_ONLY, "")]


def open_container(path: Place) -> Tensors:
    """Open what tensors lie in, reading headers only.

    Raises
    ------
    CheckpointError
        When it is damaged, or can't be read by one process or in parts.
    """
    if path.name == _RANK_FILE:
        raise CheckpointError(
            f"{path}: is one process' flat part of an FSDP model, which says nothing of its "
            "matrices; save with SHARDED_STATE_DICT or FULL_STATE_DICT instead of "
            "LOCAL_STATE_DICT"
        )
    opening = _opening(path)
    if opening is None:
        return open_tensors(path)
    if not isinstance(path, Path):
        raise CheckpointError(
            f"{path}: is read on this machine alone; download all of its folder and give its path"
        )
    return opening(path)


def _opening(path: Place) -> Callable[[Path], Tensors] | None:
    if path.name == METADATA_FILE:
        return open_distributed
    if path.name in MODEL_FILES:
        return open_deepspeed
    return open_gguf if path.suffix == ENDING else None
