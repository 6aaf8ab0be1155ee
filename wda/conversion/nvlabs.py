"""Adapters as the code of the DoRA paper reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wda.conversion.change import Change, Weight
from wda.conversion.files import save_config, save_pickle
from wda.conversion.peft import weight_tensors
from wda.conversion.source import Source
from wda.conversion.target import Target

_FILES = ("adapter_model.bin", "adapter_config.json")


def _write(
    folder: Path, changes: Sequence[Change], weights: Sequence[Weight], source: Source
) -> None:
    tensors = weight_tensors(weights)
    for change in changes:
        path = f"base_model.model.{change.module}"
        if change.rank:
            tensors[f"{path}.lora_A.weight"] = change.A
            tensors[f"{path}.lora_B.weight"] = change.B
        assert change.magnitude is not None
        tensors[f"{path}.weight_m_wdecomp.weight"] = change.magnitude.reshape(-1, 1)
    save_pickle(folder / _FILES[0], tensors)
    factors = [change for change in changes if change.rank]
    alone = [change.module for change in changes if not change.rank]
    save_config(
        folder,
        {
            "peft_type": "DORA",
            "task_type": source.config.get("task_type"),
            "base_model_name_or_path": source.adapter.base,
            "inference_mode": True,
            # Without factors the code still asks for a rank.
            "r": factors[0].rank if factors else 1,
            "lora_alpha": factors[0].alpha if factors else 1,
            "target_modules": [change.module for change in factors],
            "Wdecompose_target_modules": alone or None,
            "dora_simple": True,
            "modules_to_save": [weight.module for weight in weights] or None,
            "lora_dropout": 0.0,
            "merge_weights": False,
            "bias": "none",
            "fan_in_fan_out": source.turned,
        },
    )


NVLABS = Target(_FILES, _write, "all", magnitude_alone=True, one_scaling=True, weights=True)
