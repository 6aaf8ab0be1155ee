"""LoRA and DoRA as NeMo 2 writes them: its distributed checkpoint, or one file made of it.

Keys end in ``adapter.linear_in.weight`` (rank, in), ``adapter.linear_out.weight`` (out, rank) and
``adapter.weight_magnitude`` (out,). Megatron fuses queries, keys and values of a query group, and
gate and up; it may stack all layers in one tensor, which then has no number in its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from wda.checkpoints.adapter import Adapter
from wda.checkpoints.factors import sort_names
from wda.checkpoints.forms import Wanted
from wda.checkpoints.found import Found
from wda.checkpoints.full import FullCheckpoint
from wda.checkpoints.fused_forms import Share, unstacked
from wda.errors import CheckpointError, listing
from wda.fused import parts
from wda.naming import align
from wda.updates import Update

_ENDINGS = {
    "A": re.compile(r"\.adapter\.linear_in\.weight$"),
    "B": re.compile(r"\.adapter\.linear_out\.weight$"),
    "magnitude": re.compile(r"\.adapter\.weight_magnitude$"),
}
_STACKED = re.compile(r"(.*\blayers)\.(?!\d)(.*\.adapter\..*)")
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)$")

# Megatron's modules → Hugging Face's of a Llama, by the label of each part of a fused one.
_FUSED = {
    "self_attention.linear_qkv": {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
    },
    "mlp.linear_fc1": {"gate": "mlp.gate_proj", "up": "mlp.up_proj"},
}
_SINGLE = {"self_attention.linear_proj": "self_attn.o_proj", "mlp.linear_fc2": "mlp.down_proj"}


@dataclass(frozen=True)
class _MegatronShare(Share):
    """A part of one of Megatron's fused projections; where it lies, the base's heads tell."""

    name: str = ""
    label: str = ""

    @property
    def shape(self) -> tuple[None, int | None]:
        """(out_features, in_features), of which only the base knows the first."""
        return None, self.inner.shape[1]

    def placed(self, wanted: Wanted) -> Share:
        """Give the share with the rows that the base's heads tell."""
        rows = self.inner.shape[0] or 0
        config = {**wanted.base.config, "model_type": "megatron"}
        places = parts(self.name, (rows, wanted.shape[1]), config)
        held = sum(map(len, places.get(self.label, ())))
        if held != wanted.matrix.stored_shape[0]:
            raise CheckpointError(
                f"{self.parts[0].tensors.files[0]}: {rows} rows of {self.name} do not hold "
                f"{wanted.matrix} by the heads in the base's config.json; give the base it was "
                "trained on, with its config.json"
            )
        return Share(self.inner, places[self.label])

    def update(self, wanted: Wanted) -> Update:
        """Read the update of the rows of this part."""
        return self.placed(wanted).update(wanted)


class NemoCheckpoint(Adapter):
    """The adapter of a NeMo 2 training: its folder, that of its weights, or one file."""

    layout = "NeMo adapter"
    evidence = "names ending in adapter.linear_in.weight"

    @classmethod
    def open(cls, found: Found) -> Self | None:
        """Open a file with NeMo's names."""
        if not any(map(_ENDINGS["A"].search, found.tensors)):
            return None
        canonical = [name for name in found.tensors if ".adapter.adapter_" in name]
        if canonical:
            raise CheckpointError(
                f"{found.file}: factors of the parts of a fused projection (canonical LoRA: "
                f"{listing(canonical, 2)}) are not read; export it to Hugging Face's layout"
            )
        if (alpha := found.given.alpha) is None:
            raise CheckpointError(
                f"{found.file}: NeMo stores no α beside the factors, which the scaling α/dim "
                "needs; give the alpha of the training: --alpha, or alpha in a manifest"
            )
        tensors = unstacked(found.tensors, _of_layer)
        names = sort_names(found.path, tensors, _ENDINGS, prefix="")
        forms = names.forms(lambda module: alpha / names.rank(module))
        if names["magnitude"]:
            names.require_magnitudes(names["A"], "weight_magnitude is missing", "save it again")
        shares = {
            f"{module}.{label}": _MegatronShare(form, (), module.rpartition(".")[2], label)
            for module, form in forms.items()
            for label in _FUSED.get(_inner(module), {})
        }
        method = "dora" if names["magnitude"] else "lora"
        adapter = cls(found, tensors, forms, method, names.frozen)
        adapter.forms |= shares
        return adapter

    def names_in(self, base: FullCheckpoint) -> Mapping[str, str]:
        """Give a Megatron base's names, or Hugging Face's of a Llama."""
        if any(_inner(module) in {*_FUSED, *_SINGLE} for module in base.modules):
            return super().names_in(base)
        theirs = {m: name for m in sorted(self.forms) if (name := _hugging_face_name(m))}
        rename = align(theirs.values(), base.modules)
        return {module: rename(name) for module, name in theirs.items()}

    def meaning(self, module: str) -> tuple[object, ...] | None:
        """Give what all adapters tell; nothing for a part, whose rows the base's heads tell."""
        return None if isinstance(self.forms[module], _MegatronShare) else super().meaning(module)


def _of_layer(name: str, index: int) -> str | None:
    """Name a layer's slice of a tensor that stacks all of them."""
    stacked = _STACKED.fullmatch(name)
    return stacked and f"{stacked.group(1)}.{index}.{stacked.group(2)}"


def _inner(module: str) -> str:
    layer = _LAYER.fullmatch(module)
    return layer.group(2) if layer else ""


def _hugging_face_name(module: str) -> str | None:
    """Give Hugging Face's name; None for a projection that is fused here alone."""
    layer = _LAYER.fullmatch(module)
    if layer is None or layer.group(2) in _FUSED:
        return None if layer else module
    inner, _, label = layer.group(2).rpartition(".")
    theirs = _SINGLE.get(layer.group(2)) or _FUSED.get(inner, {}).get(label) or layer.group(2)
    return f"model.layers.{layer.group(1)}.{theirs}"
