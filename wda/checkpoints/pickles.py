"""Pickles, read without running anything they contain.

PyTorch's weights-only mode builds tensors, numbers and plain containers. Trainers pickle settings
and counters of their own beside the tensors; objects of their classes become empty ones, which do
nothing. Whatever else a pickle names is refused.
"""

from __future__ import annotations

import pickle
import threading
import zipfile
from pathlib import Path
from typing import Any

import torch

from wda.errors import CheckpointError

# What trainers keep beside the tensors: how the names of its classes begin.
_SETTINGS = (
    "argparse.Namespace",
    "collections.defaultdict",
    "deepspeed.",
    "lightning.",
    "lightning_fabric.",
    "omegaconf.",
    "pathlib.",
    "pytorch_lightning.",
    "transformers.",
)

# PyTorch keeps the classes that it may build in one place for all threads.
_ONE_AT_A_TIME = threading.Lock()


class _Empty(dict[Any, Any]):
    """Stands in for an object of any class: takes what it is made from, and is nothing."""

    def __init__(self, *_args: Any, **_options: Any) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        """Ignore what the object held."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def load_pickle(path: Path) -> Any:
    """Load what PyTorch pickled, its tensors mapped where the form of the file allows.

    Raises
    ------
    CheckpointError
        When it holds more than tensors and the settings of trainers.
    """
    # Only the zip form that PyTorch writes since 1.6 can be mapped, and be looked at before.
    zipped = zipfile.is_zipfile(path)
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    empty: list[Any] = [(_Empty, name) for name in named if name.startswith(_SETTINGS)]
    try:
        with _ONE_AT_A_TIME, torch.serialization.safe_globals(empty):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: this pickle wants to run code, which is never done; only tensors are read; "
            "convert it to safetensors where you trust it"
        ) from None
