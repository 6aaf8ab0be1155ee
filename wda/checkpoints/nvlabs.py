"""DoRA as the paper's own code writes it.

Keys end in ``lora_A.weight`` (rank, in), ``lora_B.weight`` (out, rank) and
``weight_m_wdecomp.weight`` (out, 1); modules that train their magnitude alone have only the last.
The scaling is α/r, without patterns. The visual instruction tuning writes an adapter's name into
the magnitudes' keys, and all of them into ``non_lora_trainables.bin`` by mistake, beside what
else it trained.
"""

from __future__ import annotations

import re
from typing import Self

from wda.checkpoints.adapter import Adapter
from wda.checkpoints.factors import sort_names
from wda.checkpoints.found import CONFIG_FILE, Found
from wda.checkpoints.tensors import first_file, open_tensors, read_json
from wda.errors import CheckpointError

_STRAY_FILE = "non_lora_trainables.bin"

_MAGNITUDE = re.compile(r"\.weight_m_wdecomp(\.\w+)?\.weight$")
_ENDINGS = {
    "A": re.compile(r"\.lora_A(\.default)?\.weight$"),
    "B": re.compile(r"\.lora_B(\.default)?\.weight$"),
    "magnitude": _MAGNITUDE,
    "whole": re.compile(r"\.weight$"),
}


class NvlabsCheckpoint(Adapter):
    """A folder that the paper's code for commonsense reasoning or LLaVA wrote."""

    layout = "DoRA adapter of the paper's code"
    evidence = "peft_type DORA, or magnitudes called weight_m_wdecomp"

    @classmethod
    def open(cls, found: Found) -> Self | None:
        """Open a folder whose configuration or keys are this code's own."""
        if not found.is_folder or found.file is None:
            return None
        if found.config and found.config.get("peft_type") != "DORA":
            return None
        if not found.config and found.has("config.json"):
            return None  # a whole model
        tensors = found.tensors
        if (stray := found.has(_STRAY_FILE)) is not None:
            tensors = tensors.joined(open_tensors(stray))
        if not found.config and not any(map(_MAGNITUDE.search, tensors)):
            return None
        # The checkpoints of a training have none; it is written at the end, beside them.
        above = first_file(found.path.parent, CONFIG_FILE)
        config = found.config or (read_json(above) if above else {})
        if config.get("lora_alpha") is None:
            raise CheckpointError(
                f"{found.path}: no {CONFIG_FILE} with lora_alpha here or in the folder above; the "
                "scaling needs it; copy it from the end of the training"
            )
        names = sort_names(found.path, tensors, _ENDINGS)
        forms = names.forms(lambda module: float(config["lora_alpha"]) / names.rank(module))
        names.require_magnitudes(
            names["A"],
            "weight_m_wdecomp is missing",
            f"look for {_STRAY_FILE}, where the code puts magnitudes by mistake, and copy it into "
            "this folder",
        )
        base = config.get("base_model_name_or_path") or None
        return cls(found, tensors, forms, "dora", names.frozen, base)
