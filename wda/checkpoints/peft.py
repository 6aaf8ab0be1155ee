"""LoRA and DoRA adapters as Hugging Face PEFT writes them.

Keys end in ``lora_A.weight`` (rank, in), ``lora_B.weight`` (out, rank) and, for DoRA,
``lora_magnitude_vector`` (out,), with or without ``.weight``; a model's own state dict has the
adapter's name in between. The factors have these shapes for
``Conv1D`` too, whose base weight is stored as (in, out).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Self

from wda.checkpoints.adapter import Adapter
from wda.checkpoints.factors import Names, sort_names
from wda.checkpoints.found import CONFIG_FILE, WEIGHT_FILES, Found
from wda.errors import CheckpointError, listing

_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# What a tensor is → how its name ends, after the module's path.
_ENDINGS = {
    "A": re.compile(r"\.lora_A(\.[^.]+)?\.weight$"),
    "B": re.compile(r"\.lora_B(\.[^.]+)?\.weight$"),
    "magnitude": re.compile(r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?$"),
    "frozen": re.compile(r"\.base_layer\.(weight|bias)$|\.bias$"),
    "whole": re.compile(r"\.weight$"),
}

# Initialisers that leave W0 as it was; others replace it, and W0 + s·B·A is not Wt.
_HARMLESS_INITIALISERS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

# Settings that change the algebra of the update or the meaning of its keys.
_REFUSED = (
    "layer_replication",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "alora_invocation_tokens",
)


class PeftCheckpoint(Adapter):
    """An adapter folder: ``adapter_config.json`` and the adapter's tensors."""

    layout = "PEFT adapter"
    evidence = "adapter_config.json with peft_type"

    config: Mapping[str, Any]

    @classmethod
    def open(cls, found: Found) -> Self | None:
        """Open an adapter folder."""
        if not found.is_folder or not found.config:
            return None
        if found.file is None or found.file.name in WEIGHT_FILES:
            raise CheckpointError(
                f"{found.path}: {CONFIG_FILE} without weights; expected {' or '.join(_FILES)}"
            )
        if (whole := found.has(*WEIGHT_FILES)) is not None:
            raise CheckpointError(
                f"{found.path}: holds an adapter ({found.file.name}) and a whole model "
                f"({whole.name}), which may have the adapter merged into it already; move one of "
                "them away"
            )
        config = found.config
        _check_config(found)
        names = sort_names(found.path, found.tensors, _ENDINGS)
        forms = names.forms(lambda module: _scaling(config, names, module))
        _check_ranks(config, names)
        _check_magnitudes(config, names)
        method = "dora" if config.get("use_dora") else "lora"
        base = config.get("base_model_name_or_path") or None
        checkpoint = cls(found, found.tensors, forms, method, names.unread, base)
        checkpoint.config = config
        return checkpoint

    def says_transposed(self, module: str, stored: tuple[int, int]) -> bool:
        """Tell whether ``fan_in_fan_out`` holds for a base matrix of this stored shape."""
        if module not in self.required or not self.config.get("fan_in_fan_out"):
            return False
        return stored == self.forms[module].shape[::-1]


def _scaling(config: Mapping[str, Any], names: Names, module: str) -> float:
    """Give the factor s of a module: α/r, or α/√r for rsLoRA, with the module's own α and r."""
    rank = names.rank(module)
    alpha = _setting(config, "alpha_pattern", module, "lora_alpha")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _setting(
    config: Mapping[str, Any], pattern_field: str, module: str, default_field: str
) -> float:
    """Look a per-module setting up as PEFT does: the first pattern that fits the name's end."""
    for pattern, value in (config.get(pattern_field) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(config[default_field])


def _check_config(found: Found) -> None:
    """Refuse what cannot be read right."""
    config, config_file = found.config, found.folder / CONFIG_FILE
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{config_file}: peft_type {config.get('peft_type')!r} is not read yet; "
            "'LORA' (LoRA, rsLoRA, DoRA) is"
        )
    absent = [field for field in ("r", "lora_alpha") if config.get(field) is None]
    if absent:
        raise CheckpointError(f"{config_file}: {listing(absent)} missing; the scaling needs it")
    initialiser = config.get("init_lora_weights")
    if initialiser not in _HARMLESS_INITIALISERS:
        raise CheckpointError(
            f"{config_file}: init_lora_weights {initialiser!r} changes the base weight before "
            "training, so W0 + s·B·A is not the trained weight; convert the adapter to a plain "
            "LoRA with peft's path_initial_model_for_weight_conversion and compare that"
        )
    refused = [field for field in _REFUSED if config.get(field)]
    if refused:
        raise CheckpointError(
            f"{config_file}: {listing(refused)} changes what the tensors mean and is not read "
            "yet; merge the adapter with peft and compare the merged model"
        )


def _check_ranks(config: Mapping[str, Any], names: Names) -> None:
    ranks = {module: names.rank(module) for module in sorted(names["A"])}
    wrong = [
        f"{module} (rank {rank} in the file, {declared:g} in the config)"
        for module, rank in ranks.items()
        if rank != (declared := _setting(config, "rank_pattern", module, "r"))
    ]
    if wrong:
        raise CheckpointError(
            f"{names.path}: factors that do not fit {CONFIG_FILE}: {listing(wrong, 6)}; "
            "weights and config must come from one training"
        )


def _check_magnitudes(config: Mapping[str, Any], names: Names) -> None:
    if not config.get("use_dora"):
        if names["magnitude"]:
            raise CheckpointError(
                f"{names.path}: has lora_magnitude_vector tensors but use_dora is not true in "
                f"{CONFIG_FILE}; set it if this is a DoRA adapter"
            )
        return
    names.require_magnitudes(
        names["A"],
        "use_dora is true but lora_magnitude_vector is missing",
        "save the adapter again with its magnitudes",
    )
