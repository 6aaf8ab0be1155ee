"""Writing the files that layouts have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from wda.checkpoints.found import CONFIG_FILE


def save_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors."""
    save_file(_own(tensors), file, metadata={"format": "pt"})


def save_pickle(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as PyTorch does."""
    torch.save(_own(tensors), file)


def save_config(folder: Path, config: Mapping[str, object]) -> None:
    """Write ``adapter_config.json``."""
    save_json(folder / CONFIG_FILE, config)


def save_json(file: Path, content: Mapping[str, object]) -> None:
    """Write a JSON object."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every tensor memory of its own: they may be views of what is mapped."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
