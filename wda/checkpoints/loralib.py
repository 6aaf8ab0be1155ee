"""LoRA as microsoft/LoRA (loralib) writes it: state dicts of its factors, or of the whole model.

Keys end in ``lora_A`` and ``lora_B``, without ``.weight``; α is stored nowhere. ``MergedLinear``
has factors of its own for some parts of a fused projection, and which ones is stored nowhere
either. A model that is saved in eval mode has its factors merged into the weight beside them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Self

import torch

from wda.checkpoints.adapter import Adapter
from wda.checkpoints.factors import Names, sort_names
from wda.checkpoints.forms import Around, Factors, Form, Stored, Wanted
from wda.checkpoints.found import Found
from wda.checkpoints.fused_forms import BlockDiagonal, behind
from wda.checkpoints.given import Given
from wda.errors import CheckpointError, listing
from wda.fused import ATTENTION, NAMES
from wda.updates import Update, merged

_ENDINGS = {
    "A": re.compile(r"\.lora_A$"),
    "B": re.compile(r"\.lora_B$"),
    "whole": re.compile(r"\.weight$"),
}
_BY_HAND = re.compile(r"\.(m|magnitude|dora_m)$")
_EMBEDDING = re.compile(r"embed|(^|\.)w[tp]e$")


@dataclass(frozen=True)
class PerhapsMerged(Around):
    """A change beside a weight that is W0, or has the change merged into it already.

    Attributes
    ----------
    inner : Form
        The change.
    weight : Stored
        The weight beside it.
    """

    weight: Stored

    @property
    def words(self) -> str:  # type: ignore[override]
        """What Wt is made of."""
        return f"{self.inner.words}, merged into the weight or not"

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The tensors of the change, and the weight."""
        return *super().parts, self.weight

    def update(self, wanted: Wanted) -> Update:
        """Give the change of W0, once the weight is known to be W0 with or without it.

        Raises
        ------
        CheckpointError
            When it is neither.
        """
        change, name = self.inner.update(wanted), self.weight.name
        held = self.weight.tensors.read_matrix(name, wanted.matrix, wanted.rows)
        w0 = wanted.base.weight(wanted.matrix.module, wanted.matrix, wanted.rows)
        wt = merged(change, w0)
        coarsest = max(torch.finfo(t.dtype).eps for t in (held, w0, *change.factors))
        allowed = 4 * coarsest * (w0.double().norm() + wt.norm())
        to_w0, to_wt = (float((held.double() - of).norm()) for of in (w0.double(), wt))
        if min(to_w0, to_wt) > allowed:
            raise CheckpointError(
                f"{self.weight.tensors.files[0]}: {name} is neither the base's nor has the factors "
                f"beside it merged in (s = {self.scale:g}); give the base it was trained on, and "
                "its own --alpha"
            )
        return change

    def held_bytes(self, vectors: int, features: int) -> int:
        """Give the memory of the change and of the weight, in float64."""
        return super().held_bytes(vectors, features) + 8 * vectors * features


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
        return cls(found, found.tensors, forms, "lora", names.frozen)

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
