"""Adapters on disk in PEFT's layout, so that ``peft.PeftModel.from_pretrained`` loads them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wda.adapters.config import AdapterConfig
from wda.adapters.layer import is_conv1d
from wda.adapters.lora import LoRALinear
from wda.adapters.merge import require_apart
from wda.checkpoints.factors import PREFIX
from wda.checkpoints.found import CONFIG_FILE
from wda.errors import CheckpointError, listing
from wda.files import staged_folder

_FILE = "adapter_model.safetensors"

# The release of PEFT whose reading of patterns and of Conv1D's magnitudes is meant.
_VERSION = "0.18.0"

# Parameter of our modules → what PEFT calls it on disk.
_PEFT_NAMES = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}


def save_adapter(
    model: nn.Module,
    config: AdapterConfig,
    folder: Path,
    base: str,
    trained_whole: tuple[str, ...] = (),
    task_type: str | None = None,
) -> None:
    """Save a model's adapters as a PEFT folder, whole or not at all.

    Parameters
    ----------
    model : nn.Module
        A model that :func:`wda.adapters.inject` changed.
    config : AdapterConfig
        What was injected.
    folder : Path
        Where to write.
    base : str
        Location of the pre-trained model, for whoever reads the adapter.
    trained_whole : tuple of str
        Modules that were trained whole; saved beside the adapters.
    task_type : str, optional
        PEFT's name of the task, such as ``"SEQ_CLS"``.
    """
    adapted = _adapted_modules(model)
    described = {
        "peft_type": "LORA",
        "peft_version": _VERSION,
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "rank_pattern": {f"^{re.escape(name)}": 1 for name, m in adapted.items() if not len(m.A)},
        "use_dora": config.decomposed,
        "use_rslora": config.method == "rslora",
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(layer.base_layer) for layer in adapted.values()),
        "init_lora_weights": True,
        "target_modules": sorted(adapted),
        "modules_to_save": list(trained_whole) or None,
    }
    tensors = {name: _stored(p) for name, p in _named(model, trained_whole)}
    with staged_folder(folder) as scratch:
        save_file(tensors, scratch / _FILE, metadata={"format": "pt"})
        (scratch / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: nn.Module, folder: Path, trained_whole: tuple[str, ...] = ()) -> None:
    """Load the adapters of a folder into a model that has the same ones injected.

    Raises
    ------
    CheckpointError
        When folder and model do not hold the same tensors.
    ModelError
        When the model's adapters are merged, so that others could not take effect.
    """
    require_apart(model, "those of a file would change nothing")
    stored = load_file(folder / _FILE)
    wanted = dict(_named(model, trained_whole))
    if set(stored) != set(wanted):
        raise CheckpointError(
            f"{folder}: does not hold this model's adapters; differing: "
            f"{listing(sorted(set(stored) ^ set(wanted)), 6)}"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            if parameter.numel() > 0:
                parameter.copy_(stored[name])


def _stored(parameter: nn.Parameter) -> Tensor:
    """Give a tensor as it is saved: rank 0, which PEFT does not know, as rank 1 of zeros."""
    tensor = parameter.detach().cpu().contiguous()
    return tensor if tensor.numel() else tensor.new_zeros([max(n, 1) for n in tensor.shape])


def _adapted_modules(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def _named(model: nn.Module, trained_whole: tuple[str, ...]) -> list[tuple[str, nn.Parameter]]:
    """Name the trained tensors as PEFT does."""
    adapters = [
        (f"{PREFIX}{module}.{_PEFT_NAMES[name]}", parameter)
        for module, layer in _adapted_modules(model).items()
        for name, parameter in layer.named_parameters(recurse=False)
    ]
    whole = [
        (f"{PREFIX}{module}.{name}", parameter)
        for module in trained_whole
        for name, parameter in model.get_submodule(module).named_parameters()
    ]
    return adapters + whole
