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

from wda.checkpoints.adapter import CONFIG_FILE, Adapter
from wda.checkpoints.full import WEIGHT_FILES
from wda.checkpoints.tensors import Tensors, first_file, open_tensors, read_json
from wda.errors import CheckpointError, listing
from wda.places import Place

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

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

    endings = _ENDINGS

    def __init__(self, path: Place, config: Mapping[str, Any], tensors: Tensors) -> None:
        super().__init__(path, config, tensors)
        self.method = "dora" if config.get("use_dora") else "lora"

    @classmethod
    def open(cls, path: Place) -> Self | None:
        """Open an adapter folder."""
        if not path.is_dir() or not (path / CONFIG_FILE).is_file():
            return None
        file = first_file(path, *ADAPTER_FILES)
        whole = first_file(path, *WEIGHT_FILES)
        if file is None:
            raise CheckpointError(
                f"{path}: {CONFIG_FILE} without weights; expected {' or '.join(ADAPTER_FILES)}"
            )
        if whole is not None:
            raise CheckpointError(
                f"{path}: holds an adapter ({file.name}) and a whole model ({whole.name}), which "
                "may have the adapter merged into it already; move one of them away"
            )
        return cls(path, read_json(path / CONFIG_FILE), open_tensors(file))

    def says_transposed(self, module: str, stored: tuple[int, int]) -> bool:
        """Tell whether ``fan_in_fan_out`` holds for a base matrix of this stored shape."""
        if module not in self._names["A"] or not self.config.get("fan_in_fan_out"):
            return False
        return stored == (self.shape("A", module)[1], self.shape("B", module)[0])

    def scaling(self, module: str) -> float:
        """Give the factor s of a module: α/r, or α/√r for rsLoRA, with the module's own α and r."""
        rank = self.shape("A", module)[0]
        alpha = self._setting("alpha_pattern", module, "lora_alpha")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _setting(self, pattern_field: str, module: str, default_field: str) -> float:
        """Look a per-module setting up as PEFT does: the first pattern that fits the name's end."""
        for pattern, value in (self.config.get(pattern_field) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return float(self.config[default_field])

    def check(self) -> None:
        """Refuse what cannot be read right."""
        config_file = self.path / CONFIG_FILE
        if self.config.get("peft_type") != "LORA":
            raise CheckpointError(
                f"{config_file}: peft_type {self.config.get('peft_type')!r} is not read yet; "
                "'LORA' (LoRA, rsLoRA, DoRA) is"
            )
        absent = [field for field in ("r", "lora_alpha") if self.config.get(field) is None]
        if absent:
            raise CheckpointError(f"{config_file}: {listing(absent)} missing; the scaling needs it")
        initialiser = self.config.get("init_lora_weights")
        if initialiser not in _HARMLESS_INITIALISERS:
            raise CheckpointError(
                f"{config_file}: init_lora_weights {initialiser!r} changes the base weight before "
                "training, so W0 + s·B·A is not the trained weight; convert the adapter to a plain "
                "LoRA with peft's path_initial_model_for_weight_conversion and compare that"
            )
        refused = [field for field in _REFUSED if self.config.get(field)]
        if refused:
            raise CheckpointError(
                f"{config_file}: {listing(refused)} changes what the tensors mean and is not read "
                "yet; merge the adapter with peft and compare the merged model"
            )
        super().check()
        self._check_ranks()
        self._check_magnitudes()

    def _check_ranks(self) -> None:
        ranks = {module: self.shape("A", module)[0] for module in sorted(self._names["A"])}
        wrong = [
            f"{module} (rank {rank} in the file, {declared:g} in the config)"
            for module, rank in ranks.items()
            if rank != (declared := self._setting("rank_pattern", module, "r"))
        ]
        if wrong:
            raise CheckpointError(
                f"{self.path}: factors that do not fit {CONFIG_FILE}: {listing(wrong, 6)}; "
                "weights and config must come from one training"
            )

    def _check_magnitudes(self) -> None:
        declared, magnitudes = bool(self.config.get("use_dora")), self._names["magnitude"]
        if not declared and magnitudes:
            raise CheckpointError(
                f"{self.path}: has lora_magnitude_vector tensors but use_dora is not true in "
                f"{CONFIG_FILE}; set it if this is a DoRA adapter"
            )
        missing = sorted(set(self._names["A"]) - set(magnitudes)) if declared else []
        if missing:
            raise CheckpointError(
                f"{self.path}: use_dora is true but lora_magnitude_vector is missing for "
                f"{listing(missing)}; save the adapter again with its magnitudes, nothing stands "
                "in for them"
            )
