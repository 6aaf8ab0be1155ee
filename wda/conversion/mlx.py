"""Adapters as MLX-LM reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from wda.conversion.change import Change, Weight
from wda.conversion.files import save_config, save_safetensors
from wda.conversion.source import Source
from wda.conversion.target import Target
from wda.naming import layer_index

_FILES = ("adapters.safetensors", "adapter_config.json")


def _write(
    folder: Path, changes: Sequence[Change], _weights: Sequence[Weight], source: Source
) -> None:
    tensors = {}
    for change in changes:
        tensors[f"{change.module}.lora_a"] = change.A.T
        tensors[f"{change.module}.lora_b"] = change.B.T
        if change.magnitude is not None:
            tensors[f"{change.module}.m"] = change.magnitude
    save_safetensors(folder / _FILES[0], tensors)
    layers = {layer_index(change.module) for change in changes} - {None}
    # A module's whole path is looked up in the whole model; paths in a layer would be looked up in
    # each of the last layers.
    parameters = {
        "rank": changes[0].rank,
        "scale": changes[0].scaling,
        "dropout": 0.0,
        "keys": [change.module for change in changes],
    }
    save_config(
        folder,
        {
            "fine_tune_type": "lora" if changes[0].magnitude is None else "dora",
            "model": source.adapter.base,
            "num_layers": len(layers),
            "lora_parameters": parameters,
        },
    )


# MLX has no float64 on a GPU.
MLX = Target(_FILES, _write, "all or none", one_scaling=True, computed=torch.float32)
