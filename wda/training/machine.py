"""Whether this machine can do a training: its precision, and the room on its disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from wda.errors import DeviceError, OutputError


def require_precision(precision: str) -> None:
    """Refuse a precision that the device does not have.

    Parameters
    ----------
    precision : str
        ``float32``, ``bfloat16`` or ``float16``.

    Raises
    ------
    DeviceError
        Naming what it has instead.
    """
    accelerator = torch.accelerator.current_accelerator()
    if precision == "float16" and accelerator is None:
        raise DeviceError(
            "precision: float16 is for GPUs, and there is none here; a processor takes many times "
            "as long with it; choose bfloat16 or float32"
        )
    on_cuda = accelerator is not None and accelerator.type == "cuda"
    if precision == "bfloat16" and on_cuda and not torch.cuda.is_bf16_supported(False):
        raise DeviceError(
            f"precision: {torch.cuda.get_device_name()} has no bfloat16 of its own; choose float16 "
            "or float32"
        )


def room_needed(checkpoint: int, kept: int) -> int:
    """Give the bytes of so many checkpoints, one of them with AdamW's two moments."""
    return checkpoint * (kept + 2)


def free_room(folder: Path) -> int:
    """Give the bytes that are free where a folder is, or would be made."""
    path = folder.absolute()
    there = next(f for f in (path, *path.parents) if os.path.lexists(f))
    return shutil.disk_usage(there).free


def require_room(folder: Path, checkpoint: int, kept: int) -> None:
    """Refuse a training whose checkpoints do not fit on the disk, before it begins.

    Raises
    ------
    OutputError
        With what they take and what is free.
    """
    needed, free = room_needed(checkpoint, kept), free_room(folder)
    if needed > free:
        raise OutputError(
            f"{folder}: {kept} checkpoints take {needed / 1e9:.2f} GB with the optimiser's state, "
            f"and {free / 1e9:.2f} GB are free; make room, keep fewer, or choose another folder"
        )
