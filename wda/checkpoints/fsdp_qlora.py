"""LoRA and DoRA as AnswerDotAI's fsdp_qlora writes them: QDoRA, which the DoRA paper points to.

DoRA's keys end in ``dora_layer.lora_A.weight`` (rank, in), ``dora_layer.lora_B.weight`` (out, rank)
and ``magnitude_layer.magnitude`` (out,); its layer adds B·A as it is, whatever α is. LoRA's end in
``lora_AB.0.weight`` and ``lora_AB.1.weight`` and are scaled by α/r, with α stored nowhere.
"""

from __future__ import annotations

import re
from typing import Self

from wda.checkpoints.adapter import Adapter
from wda.checkpoints.factors import sort_names
from wda.checkpoints.found import Found
from wda.errors import CheckpointError

_DORA, _LORA = r"\.dora_layer\.lora_", r"\.lora_AB\."
_ENDINGS = {
    "A": re.compile(rf"({_DORA}A|{_LORA}0)\.weight$"),
    "B": re.compile(rf"({_DORA}B|{_LORA}1)\.weight$"),
    "magnitude": re.compile(r"\.magnitude_layer\.magnitude$"),
    "frozen": re.compile(r"\.base_layer\.weight$"),
    "whole": re.compile(r"\.weight$"),
}


class FsdpQloraCheckpoint(Adapter):
    """The ``model_state_dict.safetensors`` of a training with fsdp_qlora's own layers."""

    layout = "fsdp_qlora state dict"
    evidence = "names in dora_layer and magnitude_layer, or in lora_AB"

    @classmethod
    def open(cls, found: Found) -> Self | None:
        """Open a file with names of these layers."""
        if not any(map(_ENDINGS["A"].search, found.tensors)):
            return None
        names = sort_names(found.path, found.tensors, _ENDINGS)
        with_dora = {m for m, name in names["A"].items() if ".dora_layer." in name}
        alpha = found.given.alpha
        if alpha is None and len(with_dora) < len(names["A"]):
            raise CheckpointError(
                f"{found.file}: fsdp_qlora stores no α, which the scaling α/r of its LoRA needs; "
                "give the lora_alpha of the training: --alpha, or alpha in a manifest"
            )

        def scaling(module: str) -> float:
            return 1.0 if module in with_dora else float(alpha or 0) / names.rank(module)

        forms = names.forms(scaling)
        names.require_magnitudes(
            with_dora, "magnitude_layer.magnitude is missing", "save it with its magnitudes"
        )
        return cls(found, found.tensors, forms, "dora" if with_dora else "lora", names.frozen)
