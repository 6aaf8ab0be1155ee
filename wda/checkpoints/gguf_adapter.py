"""LoRA as llama.cpp's ``convert_lora_to_gguf.py`` writes it.

Names end in ``lora_a`` (rank, in) and ``lora_b`` (out, rank), of embeddings (tokens, rank) and
(width, rank). The factor s is α/r with the one α of the file, and 1 where that is 0, as llama.cpp
takes it. B of a llama's queries and keys has its rows in llama.cpp's order, the halves of every
head one among the other; the file does not say how many rows a head has, but the base does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from wda.checkpoints.adapter import Adapter
from wda.checkpoints.factors import sort_names
from wda.checkpoints.forms import Factors, Form, Stored, Wanted
from wda.checkpoints.found import Found
from wda.checkpoints.fused_forms import Share
from wda.checkpoints.gguf import ADAPTER, ALPHA, ARCHITECTURE, INVOKED, KIND, TYPE
from wda.checkpoints.torchtune import halves, head_size
from wda.errors import CheckpointError
from wda.updates import Update

_ENDINGS = {"A": re.compile(r"\.lora_a$"), "B": re.compile(r"\.lora_b$")}
_EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True)
class _OfHeads(Share):
    """All rows of a form, in the order of the base, whose ``config.json`` tells the heads' size."""

    @property
    def shape(self) -> tuple[None, int | None]:
        """(None, in_features): the rows are placed by the base."""
        return None, self.inner.shape[1]

    def placed(self, wanted: Wanted) -> Share:
        """Give them in the base's order."""
        rows, size = self.inner.shape[0] or 0, head_size(wanted.base.config)
        if not size or rows % size or rows != wanted.matrix.stored_shape[0]:
            raise CheckpointError(
                f"{self.parts[0].tensors.files[0]}: the {rows} rows of {self.parts[1].name} are in "
                f"llama.cpp's order, by heads of {size or 'a size that is not known'}, and "
                f"{wanted.matrix} has {wanted.matrix.stored_shape[0]}; give the base it was "
                "trained on, with its config.json"
            )
        return Share(self.inner, halves(rows, size))

    def update(self, wanted: Wanted) -> Update:
        """Read the update of the wanted rows."""
        return self.placed(wanted).update(wanted)


class GgufAdapter(Adapter):
    """A ``.gguf`` file that says it is an adapter."""

    layout = "LoRA of llama.cpp"
    evidence = "general.type adapter in a .gguf"

    @classmethod
    def open(cls, found: Found) -> Self | None:
        """Open a file whose header says so."""
        if (said := found.tensors.metadata).get(TYPE) != ADAPTER:
            return None
        if said.get(KIND) != "lora" or INVOKED in said:
            raise CheckpointError(
                f"{found.file}: its {KIND} is {said.get(KIND)!r}"
                f"{', switched on by some tokens' if INVOKED in said else ''}; 'lora' that holds "
                "for every token is read; give the adapter it was converted from"
            )
        if (alpha := found.given.alpha) is None and ALPHA in said:
            alpha = float(said[ALPHA])
        if alpha is None:
            raise CheckpointError(
                f"{found.file}: has no {ALPHA}, which the scaling needs; give it: --alpha, or "
                "alpha in a manifest"
            )
        names = sort_names(found.path, found.tensors, _ENDINGS, prefix="")
        names.require_pairs()
        interleaved = said[ARCHITECTURE] == "llama"
        forms: dict[str, Form] = {}
        for module in names["A"]:
            a, b = names.stored("A", module), names.stored("B", module)
            scaling = alpha / b.shape[1] if alpha else 1.0
            if module == _EMBEDDING:
                turned = Stored(found.tensors, b.name, turned=True)
                form: Form = Factors(turned, a, scaling)
            else:
                form = Factors(a, b, scaling)
            if form.rank != b.shape[1]:
                raise CheckpointError(
                    f"{found.file}: factors that do not fit each other: {module} (A {a.shape}, "
                    f"B {b.shape}); convert it again"
                )
            by_heads = interleaved and module.endswith((".q_proj", ".k_proj"))
            forms[module] = _OfHeads(form, ()) if by_heads else form
        return cls(found, found.tensors, forms, "lora")

    def meaning(self, module: str) -> tuple[object, ...] | None:
        """Give what all adapters tell; nothing where the base tells the order of rows."""
        return None if isinstance(self.forms[module], _OfHeads) else super().meaning(module)
