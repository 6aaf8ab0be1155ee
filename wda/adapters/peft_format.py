"""Adapters on disk in PEFT's layout, so that ``peft.PeftModel.from_pretrained`` loads them.

What PEFT does not know goes by a ``peft_type`` of its own, so that PEFT refuses it rather than
misread it: ``DVORA``, ``DORA_PER_INPUT``, ``WEIGHTNORM``, ``SERIES`` and ``PARALLEL``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wda.adapters.adapter import Adapter
from wda.adapters.bottleneck import bottlenecks
from wda.adapters.config import AdapterConfig
from wda.adapters.frozen import Frozen, FrozenConv, FrozenEmbedding, is_conv1d
from wda.adapters.layer import AdaptedLayer
from wda.adapters.lora import LoRA
from wda.adapters.merge import adapted_layers, require_apart
from wda.adapters.places import base_layer
from wda.adapters.prefix import has_prefix, load_prefix, prefix_described, prefix_tensors
from wda.adapters.vera import INITIAL, VeRA
from wda.adapters.weight_norm import normalised
from wda.checkpoints.factors import PREFIX
from wda.checkpoints.found import CONFIG_FILE
from wda.checkpoints.peft.lora import PER_INPUT
from wda.errors import CheckpointError, listing
from wda.files import staged_folder

_FILE = "adapter_model.safetensors"

# The release of PEFT whose reading of patterns and of Conv1D's magnitudes is meant.
_VERSION = "0.18.0"

# Where VeRA's projections stand, once for all layers.
_PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")


def save_adapter(
    model: nn.Module,
    config: AdapterConfig,
    folder: Path,
    base: str,
    trained_whole: tuple[str, ...] = (),
    task_type: str | None = None,
    name: str = "default",
) -> None:
    """Save a model's adapters as a PEFT folder, whole or not at all.

    Parameters
    ----------
    model : nn.Module
        A model that :func:`wda.adapters.inject` changed, or :func:`wda.adapters.with_prefix` made.
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
    name : str
        Which of the model's adapters.
    """
    trained, fixed = _tensors(model, trained_whole, name)
    tensors = {key: t.detach().cpu().contiguous() for key, t in (trained | fixed).items()}
    if has_prefix(model):
        described = prefix_described(model, base)
    else:
        described = _described(model, config, base, trained_whole, task_type, name)
    with staged_folder(folder) as scratch:
        save_file(tensors, scratch / _FILE, metadata={"format": "pt"})
        (scratch / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _described(
    model: nn.Module,
    config: AdapterConfig,
    base: str,
    trained_whole: tuple[str, ...],
    task_type: str | None,
    name: str,
) -> dict[str, object]:
    """Give what PEFT's configuration says."""
    modules = [*_layers(model, name), *bottlenecks(model), *normalised(model)]
    bases = [base_layer(model, module) for module in modules]
    return {
        "peft_version": _VERSION,
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        **_of_method(model, config, name),
        "bias": "none",
        "fan_in_fan_out": any(map(is_conv1d, bases)),
        "target_modules": sorted(modules),
        "modules_to_save": list(trained_whole) or None,
    }


def load_adapter(
    model: nn.Module, folder: Path, trained_whole: tuple[str, ...] = (), name: str = "default"
) -> None:
    """Load the adapter of a folder into a model that has the same one injected.

    Parameters
    ----------
    model : nn.Module
        A model that :func:`wda.adapters.inject` changed, or :func:`wda.adapters.with_prefix` made.
    folder : Path
        What :func:`save_adapter` wrote.
    trained_whole : tuple of str
        Modules that were trained whole.
    name : str
        Which of the model's adapters.

    Raises
    ------
    CheckpointError
        When folder and model do not hold the same tensors.
    ModelError
        When the model's adapters are merged, so that others could not take effect.
    """
    require_apart(model, "those of a file would change nothing")
    stored = load_file(folder / _FILE)
    wanted, fixed = _tensors(model, trained_whole, name)
    differing = _shapes(stored) ^ _shapes(wanted | fixed)
    if differing:
        raise CheckpointError(
            f"{folder}: does not hold this model's adapters; differing: "
            f"{listing(sorted({key for key, _ in differing}), 6)}"
        )
    if has_prefix(model):
        load_prefix(model, stored)
        return
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(stored[key])


def _tensors(
    model: nn.Module, trained_whole: tuple[str, ...], name: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give what was trained, and what PEFT wants to find beside it, by their names in the file."""
    if has_prefix(model):
        return prefix_tensors(model), {}
    return dict(_named(model, trained_whole, name)), _placeholders(model, name)


def _shapes(tensors: Mapping[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    return {(key, tuple(tensor.shape)) for key, tensor in tensors.items()}


def _of_method(model: nn.Module, config: AdapterConfig, name: str) -> dict[str, object]:
    if not config.changes_weights:
        return {"peft_type": config.method.upper(), "bottleneck": config.bottleneck}
    if config.method == "weightnorm":
        return {"peft_type": config.method.upper()}
    if config.shares_projections:
        return _of_vera(config)
    return _of_lora(config, _layers(model, name), name)


def _of_lora(
    config: AdapterConfig, layers: Mapping[str, AdaptedLayer], name: str
) -> dict[str, object]:
    """Give what PEFT's configuration says of LoRA and DoRA alone."""
    scaled = [module for module, layer in layers.items() if not _adapter(layer, name).rank]
    return {
        "peft_type": "LORA" if config.per == "output" else PER_INPUT,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "rank_pattern": {f"^{re.escape(module)}": 1 for module in scaled},
        "use_dora": config.decomposed,
        "use_rslora": config.method == "rslora",
        "init_lora_weights": True,
    }


def _of_vera(config: AdapterConfig) -> dict[str, object]:
    """Give what PEFT's configuration says of VeRA alone."""
    return {
        "peft_type": config.method.upper(),
        "r": config.rank,
        "vera_dropout": config.dropout,
        "projection_prng_key": 0,  # PEFT asks for one, and does not use it beside the projections
        "save_projection": True,
        "d_initial": INITIAL,
        "init_weights": True,
    }


def _layers(model: nn.Module, name: str) -> dict[str, AdaptedLayer]:
    return {m: layer for m, layer in adapted_layers(model).items() if name in layer.configs}


def _adapter(layer: AdaptedLayer, name: str) -> Adapter:
    adapter = layer.adapters[name]
    assert isinstance(adapter, Adapter)
    return adapter


def _named(
    model: nn.Module, trained_whole: tuple[str, ...], name: str
) -> Iterator[tuple[str, Tensor]]:
    """Name what is saved as PEFT does, in the shapes that PEFT gives it."""
    shared: VeRA | None = None
    for module, layer in _layers(model, name).items():
        adapter = _adapter(layer, name)
        shared = adapter if isinstance(adapter, VeRA) else shared
        for key, tensor in _named_in_layer(layer.frozen, adapter, layer.configs[name]):
            yield f"{PREFIX}{module}.{key}", tensor
    for module, beside in bottlenecks(model).items():
        yield f"{PREFIX}{module}.bottleneck_down.weight", beside.down.weight
        yield f"{PREFIX}{module}.bottleneck_up.weight", beside.up.weight
    for module, (m, v) in normalised(model).items():
        yield f"{PREFIX}{module}.weight_m", m
        yield f"{PREFIX}{module}.weight_v", v
    if shared is not None:
        yield from zip(_PROJECTIONS, shared.projections.buffers(), strict=True)
    for module in trained_whole:
        for key, parameter in model.get_submodule(module).named_parameters():
            yield f"{PREFIX}{module}.{key}", parameter


def _named_in_layer(
    frozen: Frozen, adapter: Adapter, config: AdapterConfig
) -> Iterator[tuple[str, Tensor]]:
    if isinstance(adapter, VeRA):
        yield "vera_lambda_b", adapter.lambda_b
        yield "vera_lambda_d", adapter.lambda_d
    elif isinstance(adapter, LoRA) and isinstance(frozen, FrozenEmbedding):
        yield "lora_embedding_A", adapter.A
        yield "lora_embedding_B", adapter.B
    elif isinstance(adapter, LoRA):
        yield "lora_A.weight", frozen.as_kernels(adapter.A)
        yield "lora_B.weight", frozen.along(adapter.B)
    if (m := adapter.magnitude) is not None:
        family = "vera" if config.shares_projections else "lora"
        channels = frozen.along(m)[None] if isinstance(frozen, FrozenConv) else m
        yield f"{family}_magnitude_vector", channels


def _placeholders(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Give rank 1 of zeros for rank 0, which PEFT does not know, where PEFT is to read it."""
    zeros: dict[str, Tensor] = {}
    for module, layer in _layers(model, name).items():
        config = layer.configs[name]
        if _adapter(layer, name).rank == 0 and config.per == "output" and config.method != "dvora":
            of_rank_one = LoRA(layer.frozen, 1, 1.0)
            for key, tensor in _named_in_layer(layer.frozen, of_rank_one, config):
                zeros[f"{PREFIX}{module}.{key}"] = torch.zeros_like(tensor, device="cpu")
    return zeros
