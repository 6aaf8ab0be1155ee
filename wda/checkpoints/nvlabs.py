"""DoRA as the paper's own code writes it.

Keys end in ``lora_A.weight`` (rank, in), ``lora_B.weight`` (out, rank) and
``weight_m_wdecomp.weight`` (out, 1); modules that train their magnitude alone have only the last.
The scaling is α/r, without patterns. The visual instruction tuning writes an adapter's name into
the magnitudes' keys, and all of them into ``non_lora_trainables.bin`` by mistake.
"""

from __future__ import annotations

import re
from typing import Self

from wda.checkpoints.adapter import CONFIG_FILE, Adapter
from wda.checkpoints.tensors import first_file, open_tensors, read_json
from wda.errors import CheckpointError, listing
from wda.places import Place

# Its checkpoints of a training hold the adapter alone under the names of whole models.
_FILES = (
    "adapter_model.bin",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "model.safetensors",
)
_STRAY_FILE = "non_lora_trainables.bin"

_MAGNITUDE = re.compile(r"\.weight_m_wdecomp(\.\w+)?\.weight$")
_ENDINGS = {
    "A": re.compile(r"\.lora_A(\.default)?\.weight$"),
    "B": re.compile(r"\.lora_B(\.default)?\.weight$"),
    "magnitude": _MAGNITUDE,
    "frozen": re.compile(r"\.bias$"),
    "whole": re.compile(r"\.weight$"),
}


class NvlabsCheckpoint(Adapter):
    """A folder that the paper's code for commonsense reasoning or LLaVA wrote."""

    layout = "DoRA adapter of the paper's code"
    evidence = "peft_type DORA, or magnitudes called weight_m_wdecomp"
    method = "dora"
    endings = _ENDINGS

    @classmethod
    def open(cls, path: Place) -> Self | None:
        """Open a folder whose configuration or keys are this code's own."""
        if not path.is_dir() or (file := first_file(path, *_FILES)) is None:
            return None
        own = first_file(path, CONFIG_FILE)
        if own is None and first_file(path, "config.json") is not None:
            return None  # a whole model
        # The checkpoints of a training have none; it is written at the end, beside them.
        config_file = own or first_file(path.parent, CONFIG_FILE)
        config = read_json(config_file) if config_file else {}
        if own is not None and config.get("peft_type") != "DORA":
            return None
        tensors = open_tensors(file)
        if (stray := first_file(path, _STRAY_FILE)) is not None:
            tensors = tensors.joined(open_tensors(stray), _MAGNITUDE.search)
        if own is None and not any(map(_MAGNITUDE.search, tensors)):
            return None
        return cls(path, config, tensors)

    def scaling(self, module: str) -> float:
        """Give the factor s of a module: α/r with its own r."""
        return float(self.config["lora_alpha"]) / self.shape("A", module)[0]

    def check(self) -> None:
        """Refuse what cannot be read right."""
        if self.config.get("lora_alpha") is None:
            raise CheckpointError(
                f"{self.path}: no {CONFIG_FILE} with lora_alpha here or in the folder above; the "
                "scaling needs it; copy it from the end of the training"
            )
        super().check()
        missing = sorted(set(self._names["A"]) - set(self._names["magnitude"]))
        if missing:
            raise CheckpointError(
                f"{self.path}: weight_m_wdecomp is missing for {listing(missing, 6)}; look for "
                f"{_STRAY_FILE}, where the code puts magnitudes by mistake, and copy it into this "
                "folder; nothing stands in for them"
            )
