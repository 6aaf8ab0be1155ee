"""Adapters as Hugging Face PEFT reads them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from wda.conversion.change import Change, Weight
from wda.conversion.files import save_config, save_safetensors
from wda.conversion.source import Source
from wda.conversion.target import Target

_FILES = ("adapter_model.safetensors", "adapter_config.json")
_PREFIX = "base_model.model."

# Patterns with an anchor fit whole names since this release.
_VERSION = "0.15.0"


def _write(
    folder: Path, changes: Sequence[Change], weights: Sequence[Weight], source: Source
) -> None:
    tensors = weight_tensors(weights)
    for change in changes:
        path, one = f"{_PREFIX}{change.module}", (1,) * len(change.kernel)
        features = change.A.shape[1]
        for size in change.kernel:
            features //= size
        tensors[f"{path}.lora_A.weight"] = change.A.reshape(change.rank, features, *change.kernel)
        tensors[f"{path}.lora_B.weight"] = change.B.reshape(-1, change.rank, *one)
        if change.magnitude is not None:
            m = change.magnitude.reshape(1, -1, *one) if one else change.magnitude
            tensors[f"{path}.lora_magnitude_vector"] = m
    save_safetensors(folder / _FILES[0], tensors)
    save_config(folder, _config(changes, weights, source))


def weight_tensors(weights: Sequence[Weight]) -> dict[str, Tensor]:
    """Give the tensors of modules trained whole, by the names they have in an adapter."""
    return {
        f"{_PREFIX}{weight.module}.{kind}": tensor
        for weight in weights
        for kind, tensor in weight.tensors.items()
    }


def _config(
    changes: Sequence[Change], weights: Sequence[Weight], source: Source
) -> dict[str, object]:
    rank = Counter(change.rank for change in changes).most_common(1)[0][0]
    alpha = Counter(change.alpha for change in changes).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "peft_version": _VERSION,
        "task_type": source.config.get("task_type"),
        "base_model_name_or_path": source.adapter.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_only(c): c.rank for c in changes if c.rank != rank},
        "alpha_pattern": {_only(c): c.alpha for c in changes if c.alpha != alpha},
        "target_modules": _targets(changes, source),
        "modules_to_save": [weight.module for weight in weights] or None,
        "use_dora": changes[0].magnitude is not None,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": source.turned,
    }


def _only(change: Change) -> str:
    """Give the pattern that fits this module and none whose name only ends so."""
    return f"^{re.escape(change.module)}"


def _targets(changes: Sequence[Change], source: Source) -> list[str] | str:
    """Name the modules; by an expression where other modules' names end as one of them."""
    names = [change.module for change in changes]
    endings = tuple(f".{name}" for name in names)
    if not any(module.endswith(endings) for module in source.known_modules):
        return names
    return "|".join(map(re.escape, names))


PEFT = Target(_FILES, _write, magnitudes="all or none", kernels=True, weights=True)
