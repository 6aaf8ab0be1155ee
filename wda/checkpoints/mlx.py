"""LoRA and DoRA adapters as MLX-LM writes them.

Keys end in ``lora_a`` (in, rank), ``lora_b`` (rank, out) and ``m`` (out,). The factor s stands in
``adapter_config.json`` as it is, ``lora_parameters.scale``; there is no α. The last adapter of a
training is ``adapters.safetensors``; those before have the step in front of the name.
"""

from __future__ import annotations

import re
from typing import Self

from wda.checkpoints.adapter import Adapter
from wda.checkpoints.factors import sort_names
from wda.checkpoints.found import CONFIG_FILE, Found
from wda.errors import CheckpointError, listing

_STEP_FILES = re.compile(r"(\d+)_adapters\.safetensors")

_ENDINGS = {
    "A": re.compile(r"\.lora_a$"),
    "B": re.compile(r"\.lora_b$"),
    "magnitude": re.compile(r"\.m$"),
    "frozen": re.compile(r"\.bias$"),
    "whole": re.compile(r"\.weight$"),
}


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
        scale = _scale(found, kind)
        names = sort_names(found.path, found.tensors, _ENDINGS, turned=True)
        stacked = [m for m, name in names["A"].items() if "embed" in m or "switch" in name]
        if stacked:
            raise CheckpointError(
                f"{found.path}: adapters of embeddings and of experts are not read yet: "
                f"{listing(stacked, 4)}"
            )
        forms = names.forms(lambda _module: scale)
        if kind == "dora":
            names.require_magnitudes(
                names["A"], "fine_tune_type is dora but m is missing", "save it with m"
            )
        method = "dora" if names["magnitude"] else "lora"
        base = found.config.get("model") or None
        return cls(found, found.tensors, forms, method, names.unread, base)


def _scale(found: Found, kind: object) -> float:
    """Give the factor s, the same for all modules."""
    config_file = found.folder / CONFIG_FILE
    if kind not in ("lora", "dora"):
        raise CheckpointError(
            f"{config_file}: fine_tune_type {kind!r} is not read yet; 'lora' and 'dora' are"
        )
    parameters = found.config.get("lora_parameters") or {}
    if parameters.get("scale") is None or parameters.get("alpha") is not None:
        raise CheckpointError(
            f"{config_file}: lora_parameters need scale, and no alpha, which old versions "
            "multiplied with; write scale·alpha/rank there as scale"
        )
    return float(parameters["scale"])
