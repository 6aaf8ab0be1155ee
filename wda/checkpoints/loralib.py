"""LoRA as microsoft/LoRA (loralib) writes it: state dicts of its factors, or of the whole model.

Keys end in ``lora_A`` and ``lora_B``, without ``.weight``; α is stored nowhere. ``MergedLinear``
has factors of its own for some parts of a fused projection, and which ones is stored nowhere
either. A model that is saved in eval mode has its factors merged into the weight beside them.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Self

from wda.checkpoints.adapter import Adapter
from wda.checkpoints.factors import Names, sort_names
from wda.checkpoints.forms import Factors, Form
from wda.checkpoints.found import Found
from wda.checkpoints.fused_forms import BlockDiagonal, behind
from wda.checkpoints.given import Given
from wda.checkpoints.starts import PerhapsMerged
from wda.errors import CheckpointError, listing
from wda.fused import ATTENTION, NAMES

_ENDINGS = {
    "A": re.compile(r"\.lora_A$"),
    "B": re.compile(r"\.lora_B$"),
    "frozen": re.compile(r"\.bias$"),
    "whole": re.compile(r"\.weight$"),
}
_BY_HAND = re.compile(r"\.(m|magnitude|dora_m)$")
_EMBEDDING = re.compile(r"embed|(^|\.)w[tp]e$")


class LoralibCheckpoint(Adapter):
    """A file of loralib's ``lora_state_dict``, or of a whole model with its layers."""

    layout = "loralib state dict"
    evidence = "names ending in lora_A and lora_B, without .weight"
    step_files = re.compile(r"model\.(\d+)\.pt")

    @classmethod
    def open(cls, found: Found) -> Self | None:
        """Open a file with loralib's names."""
        if "peft_type" in found.config or not any(map(_ENDINGS["A"].search, found.tensors)):
            return None
        _refuse_others(found)
        alpha = found.given.alpha
        if alpha is None:
            raise CheckpointError(
                f"{found.file}: loralib stores no α, which the scaling α/r needs; give the "
                "lora_alpha of the training: --alpha, or alpha in a manifest"
            )
        names = sort_names(found.path, found.tensors, _ENDINGS, prefix="")
        names.require_pairs()
        forms = names.wholes()
        for module in names["A"]:
            form = _form(names, module, alpha, found.given)
            whole = module in names["whole"]
            forms[module] = PerhapsMerged(form, names.stored("whole", module)) if whole else form
        return cls(found, found.tensors, forms, "lora", names.unread)

    def says_transposed(self, module: str, stored: tuple[int, int]) -> bool:
        """Tell whether a base matrix has the factors' shape only as (in, out)."""
        shape = self.forms[module].shape
        return module in self.required and stored != shape and stored == shape[::-1]


def _refuse_others(found: Found) -> None:
    """Refuse what has such names and is not loralib's."""
    if magnitudes := sorted(filter(_BY_HAND.search, found.tensors)):
        raise CheckpointError(
            f"{found.file}: has magnitudes written by hand beside lora_A and lora_B "
            f"({listing(magnitudes, 2)}); no one can tell their axis, the order of the factors and "
            "the scaling; merge it with the code that trained it, and compare the merged model"
        )
    if ranked := sorted(name for name in found.tensors if name.endswith(".lora_E")):
        raise CheckpointError(
            f"{found.file}: has singular values ({listing(ranked, 2)}), which loralib does not "
            "know; save an AdaLoRA adapter with its adapter_config.json"
        )


def _form(names: Names, module: str, alpha: float, given: Given) -> Form:
    """Tell the form of a module's factors by their shapes."""
    a, b = names.stored("A", module), names.stored("B", module)
    rank = b.shape[1]
    if _EMBEDDING.search(module):
        # B·A is the transpose of what is added to the table of tokens.
        return Factors(replace(b, turned=True), replace(a, turned=True), alpha / rank)
    blocks, rest = divmod(a.shape[0], rank)
    if rest or (len(names.tensors[a.name].shape), len(names.tensors[b.name].shape)) != (2, 2):
        raise CheckpointError(
            f"{names.path}: factors that do not fit each other: {module} (A {a.shape}, B {b.shape})"
        )
    if blocks == 1 and not (module.rpartition(".")[2] in NAMES and given.enabled):
        return Factors(a, b, alpha / rank)
    enabled = given.enabled or (ATTENTION if blocks == len(ATTENTION) else ())
    if len(enabled) != blocks or not set(enabled) <= set(ATTENTION):
        raise CheckpointError(
            f"{names.path}: {module} has factors for {blocks} of query, key and value, and stores "
            "not for which (enable_lora of the training); name them: --enabled query,value, or "
            f"enabled in a manifest; given: {', '.join(enabled) or 'nothing'}"
        )
    size = b.shape[0] // blocks
    places = behind(dict.fromkeys(ATTENTION, size))
    rows = tuple(places[label] for label in ATTENTION if label in enabled)
    return BlockDiagonal(a, b, rows, len(ATTENTION) * size, alpha / rank)
