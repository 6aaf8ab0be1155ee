"""Adapters as LyCORIS reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from wda.conversion.change import Change, Weight
from wda.conversion.files import save_safetensors
from wda.conversion.source import Source
from wda.conversion.target import Target

_FILES = ("lycoris.safetensors",)


def _write(
    folder: Path, changes: Sequence[Change], _weights: Sequence[Weight], _source: Source
) -> None:
    tensors = {}
    for change in changes:
        path, one = f"lycoris_{change.module}".replace(".", "_"), (1,) * len(change.kernel)
        features = change.A.shape[1]
        for size in change.kernel:
            features //= size
        down = change.A.reshape(change.rank, features, *change.kernel)
        tensors[f"{path}.lora_down.weight"] = down
        tensors[f"{path}.lora_up.weight"] = change.B.reshape(-1, change.rank, *one)
        tensors[f"{path}.alpha"] = torch.tensor(float(change.alpha), dtype=torch.float64)
        if change.magnitude is not None:
            tensors[f"{path}.dora_scale"] = change.magnitude.reshape(-1, 1, *one)
    save_safetensors(folder / _FILES[0], tensors)


LYCORIS = Target(_FILES, _write, magnitudes="each", kernels=True)
