"""What is on disk, read as checkpoints. A new layout is a new module and a name in ``LAYOUTS``."""

from __future__ import annotations

from wda.checkpoints.adapter import Adapter
from wda.checkpoints.checkpoint import Checkpoint, step_in
from wda.checkpoints.diffusion import (
    DiffusersCheckpoint,
    KohyaCheckpoint,
    PipelineCheckpoint,
)
from wda.checkpoints.forms import Form
from wda.checkpoints.found import WEIGHT_FILES, Found
from wda.checkpoints.fsdp_qlora import FsdpQloraCheckpoint
from wda.checkpoints.full import FullCheckpoint
from wda.checkpoints.gguf_adapter import GgufAdapter
from wda.checkpoints.given import NOTHING_GIVEN, Given
from wda.checkpoints.litgpt import LitGptAdapter, LitGptModel
from wda.checkpoints.loralib import LoralibCheckpoint
from wda.checkpoints.mlx import MlxCheckpoint
from wda.checkpoints.nemo import NemoCheckpoint
from wda.checkpoints.nvlabs import NvlabsCheckpoint
from wda.checkpoints.peft import MergedPeftCheckpoint, PeftCheckpoint
from wda.checkpoints.torchtune import TorchtuneCheckpoint, TorchtuneModel
from wda.checkpoints.trained_on import TrainedOn
from wda.checkpoints.vl_bart import VlBartCheckpoint
from wda.errors import CheckpointError, blaming
from wda.places import Place
from wda.remote import RemotePlace

__all__ = [
    "LAYOUTS",
    "Adapter",
    "Checkpoint",
    "Form",
    "FullCheckpoint",
    "Given",
    "TrainedOn",
    "open_base",
    "open_checkpoint",
    "step_in",
]

# The first layout that recognises a folder reads it; the more telling ones come first.
LAYOUTS: tuple[type[Checkpoint], ...] = (
    GgufAdapter,
    VlBartCheckpoint,
    FsdpQloraCheckpoint,
    NemoCheckpoint,
    TorchtuneCheckpoint,
    TorchtuneModel,
    LitGptAdapter,
    LitGptModel,
    LoralibCheckpoint,
    NvlabsCheckpoint,
    MlxCheckpoint,
    PeftCheckpoint,
    MergedPeftCheckpoint,
    KohyaCheckpoint,
    DiffusersCheckpoint,
    PipelineCheckpoint,
    FullCheckpoint,
)


def open_checkpoint(path: Place, given: Given = NOTHING_GIVEN) -> Checkpoint:
    """Open a checkpoint of any layout.

    Parameters
    ----------
    path : Place
        A folder or a weight file.
    given : Given
        What the user says of it that it does not say itself.

    Raises
    ------
    CheckpointError
        When no layout recognises the folder, or it is damaged.
    """
    found = Found(path, given)
    for layout in LAYOUTS:
        with blaming(path):
            checkpoint = layout.open(found)
        if checkpoint is not None:
            return checkpoint
    if isinstance(path, RemotePlace) and not path.listable:
        raise CheckpointError(
            f"{path}: none of the files of a checkpoint can be read there; a web server does not "
            "list its folders, so give the address of one checkpoint, with "
            f"{WEIGHT_FILES[0]} or adapter_config.json right in it, or name the steps in a manifest"
        )
    held = sorted(item.name for item in path.iterdir())[:6] if path.is_dir() else ["a file"]
    raise CheckpointError(
        f"{path}: no checkpoint here; expected checkpoint-<step> folders, "
        f"{', '.join(WEIGHT_FILES)}, or adapter_config.json with adapter_model.safetensors; "
        f"found {', '.join(held) or 'an empty folder'}"
    )


def open_base(path: Place) -> FullCheckpoint:
    """Open the pre-trained model that checkpoints are compared with.

    Raises
    ------
    CheckpointError
        When it is not a whole model.
    """
    base = open_checkpoint(path)
    if not isinstance(base, FullCheckpoint):
        raise CheckpointError(f"{path}: is a {base.layout}; the base must be a whole model")
    return base
