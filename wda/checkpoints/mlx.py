"""LoRA and DoRA adapters as MLX-LM writes them.

Keys end in ``lora_a`` (in, rank), ``lora_b`` (rank, out) and ``m`` (out,). The factor s stands in
``adapter_config.json`` as it is, ``lora_parameters.scale``; there is no α. The last adapter of a
training is ``adapters.safetensors``; those before have the step in front of the name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Self

from wda.checkpoints.adapter import CONFIG_FILE, Adapter
from wda.checkpoints.tensors import Tensors, first_file, open_tensors, read_json
from wda.errors import CheckpointError, listing
from wda.places import Place

_FILE = "adapters.safetensors"
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
    endings = _ENDINGS
    factors_transposed = True

    def __init__(self, path: Place, config: Mapping[str, Any], tensors: Tensors) -> None:
        super().__init__(path, config, tensors)
        self.method = "dora" if self._names["magnitude"] else "lora"
        self.base = config.get("model") or None

    @classmethod
    def open(cls, path: Place) -> Self | None:
        """Open a folder, or the file of one step, whose configuration is MLX-LM's."""
        of_step = _STEP_FILES.fullmatch(path.name) is not None and path.is_file()
        folder = path.parent if of_step else path
        file = path if of_step else first_file(path, _FILE) if path.is_dir() else None
        if file is None or not (folder / CONFIG_FILE).is_file():
            return None
        config = read_json(folder / CONFIG_FILE)
        if not {"lora_parameters", "fine_tune_type"} & set(config):
            return None
        return cls(path, config, open_tensors(file))

    def scaling(self, module: str) -> float:  # noqa: ARG002
        """Give the factor s, the same for all modules."""
        return float(self.config["lora_parameters"]["scale"])

    def check(self) -> None:
        """Refuse what cannot be read right."""
        config_file, kind = self.path / CONFIG_FILE, self.config.get("fine_tune_type", "lora")
        if kind not in ("lora", "dora"):
            raise CheckpointError(
                f"{config_file}: fine_tune_type {kind!r} is not read yet; 'lora' and 'dora' are"
            )
        parameters = self.config.get("lora_parameters") or {}
        if parameters.get("scale") is None or parameters.get("alpha") is not None:
            raise CheckpointError(
                f"{config_file}: lora_parameters need scale, and no alpha, which old versions "
                "multiplied with; write scale·alpha/rank there as scale"
            )
        super().check()
        missing = sorted(set(self._names["A"]) - set(self._names["magnitude"]))
        if kind == "dora" and missing:
            raise CheckpointError(
                f"{self.path}: fine_tune_type is dora but m is missing for {listing(missing, 6)}; "
                "nothing stands in for it"
            )
        stacked = [m for m, name in self._names["A"].items() if "embed" in m or "switch" in name]
        if stacked:
            raise CheckpointError(
                f"{self.path}: adapters of embeddings and of experts are not read yet: "
                f"{listing(stacked, 4)}"
            )
