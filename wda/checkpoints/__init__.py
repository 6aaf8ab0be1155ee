"""What is on disk, read as checkpoints. A new layout is a new module and a name in ``LAYOUTS``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

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
from wda.errors import CheckpointError, LocationError, ManifestError, blaming, listing
from wda.locations import locate, of_model_reference
from wda.places import Place, shown
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
    "open_named_base",
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


def open_named_base(
    checkpoints: Iterable[Checkpoint],
    given: str | Path | None = None,
    find: Callable[[str | Path], Place] = locate,
) -> tuple[str, FullCheckpoint]:
    """Open the base that checkpoints are compared with: the given one, or the one that they name.

    Parameters
    ----------
    checkpoints : iterable of Checkpoint
        The checkpoints.
    given : path or location, optional
        What the user says, which counts before what they name.
    find : callable
        Gives the place of a location: :func:`wda.locations.locate`, or
        :func:`wda.locations.resolve` where all of it is needed on this machine.

    Returns
    -------
    location : str
        Where it lies.
    base : FullCheckpoint
        The model.

    Raises
    ------
    LocationError
        When nothing is given and none of them names one, or it is not to be had.
    ManifestError
        When they name several.
    CheckpointError
        When it is not a whole model.
    """
    if given is not None:
        return str(given), open_base(find(given))
    named = sorted({checkpoint.base for checkpoint in checkpoints if checkpoint.base})
    if len(named) > 1:
        raise ManifestError(
            f"base: the adapters name several bases ({listing(map(shown, named))}); compare runs "
            "of one base at a time, or give the right one with --base"
        )
    if not named:
        raise LocationError(
            "base: the pre-trained model is not known, for none of these checkpoints names it; "
            "give it with --base LOCATION"
        )
    location = of_model_reference(named[0])
    try:
        place = find(location)
    except LocationError as error:
        raise LocationError(
            f"base: the adapters name {shown(named[0])} as their base, which is not to be had "
            f"({error}); give it with --base LOCATION"
        ) from None
    return location, open_base(place)
