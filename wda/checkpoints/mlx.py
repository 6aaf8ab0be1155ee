"""LoRA, DoRA and full fine-tuning as MLX-LM writes them.

Keys end in ``lora_a`` (in, rank), ``lora_b`` (rank, out) and ``m`` (out,). Of an embedding they are
(tokens, rank), (rank, width) and (tokens,); of experts, which MLX stacks, (experts, rank, in) and
(experts, out, rank). The factor s stands in ``adapter_config.json`` as it is,
``lora_parameters.scale``; there is no α. The last adapter of a training is
``adapters.safetensors``; those before have the step in front of the name.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Self

from wda.checkpoints.adapter import Adapter
from wda.checkpoints.factors import Names, sort_names
from wda.checkpoints.forms import Decomposed, Factors, Form, Stored, Whole
from wda.checkpoints.found import CONFIG_FILE, Found
from wda.errors import CheckpointError

_STEP_FILES = re.compile(r"(\d+)_adapters\.safetensors")

_ENDINGS = {
    "A": re.compile(r"\.lora_a$"),
    "B": re.compile(r"\.lora_b$"),
    "magnitude": re.compile(r"\.m$"),
    "whole": re.compile(r"\.weight$"),
}
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|tok_embeddings|word_embeddings|embeddings?)$")


class MlxCheckpoint(Adapter):
    """A folder with MLX-LM's last adapter, or the file of a step."""

    layout = "MLX-LM adapter"
    evidence = "adapter_config.json with lora_parameters or fine_tune_type"
    step_files = _STEP_FILES

    @classmethod
    def open(cls, found: Found) -> Self | None:
        """Open a folder, or the file of one step, whose configuration is MLX-LM's."""
        if found.file is None or not {"lora_parameters", "fine_tune_type"} & set(found.config):
            return None
        kind = found.config.get("fine_tune_type", "lora")
        base = found.config.get("model") or None
        if kind == "full":
            return cls(found, found.tensors, _wholes(found), "ft", base=base)
        scale = _scale(found, kind)
        names = sort_names(found.path, found.tensors, _ENDINGS)
        names.require_pairs()
        forms = names.wholes()
        for module in names["A"]:
            forms[module] = _form(names, module, scale)
        if kind == "dora":
            names.require_magnitudes(
                names["A"], "fine_tune_type is dora but m is missing", "save it with m"
            )
        method = "dora" if names["magnitude"] else "lora"
        return cls(found, found.tensors, forms, method, names.frozen, base)


def _scale(found: Found, kind: object) -> float:
    """Give the factor s, the same for all modules."""
    config_file = found.folder / CONFIG_FILE
    if kind not in ("lora", "dora"):
        raise CheckpointError(
            f"{config_file}: fine_tune_type {kind!r} is not read yet; 'lora', 'dora' and 'full' are"
        )
    parameters = found.config.get("lora_parameters") or {}
    if parameters.get("scale") is None or parameters.get("alpha") is not None:
        raise CheckpointError(
            f"{config_file}: lora_parameters need scale, and no alpha, which old versions "
            "multiplied with; write scale·alpha/rank there as scale"
        )
    return float(parameters["scale"])


def _form(names: Names, module: str, scale: float) -> Form:
    """Tell the form of a module by its name: what A and B are differs with its kind."""
    a, b = names.stored("A", module), names.stored("B", module)
    if _EMBEDDING.search(module):
        factors = Factors(b, a, scale)
    elif _of_one_expert(module):
        factors = Factors(a, b, scale)
    else:
        factors = Factors(replace(a, turned=True), replace(b, turned=True), scale)
    if factors.A.shape[0] != factors.B.shape[1]:
        raise CheckpointError(
            f"{names.path}: factors that do not fit each other: {module} (A {a.shape}, "
            f"B {b.shape}); all of them must come from one training"
        )
    if module not in names["magnitude"]:
        return factors
    magnitude = names.stored("magnitude", module)
    if magnitude.shape[0] != factors.B.shape[0]:
        raise CheckpointError(
            f"{names.path}: m of {module} has {magnitude.shape[0]} numbers for "
            f"{factors.B.shape[0]} output features"
        )
    return Decomposed(factors, magnitude)


def _of_one_expert(module: str) -> bool:
    return re.search(r"\.experts\.\d+\.\w+$", module) is not None


def _wholes(found: Found) -> dict[str, Form]:
    """Give the weights of the layers that were trained in full."""
    return {
        _ENDINGS["whole"].sub("", name): Whole(Stored(found.tensors, name))
        for name, entry in found.tensors.items()
        if _ENDINGS["whole"].search(name) and len(entry.shape) == 2
    }
