"""LoRA, DoRA and whole models as torchtune writes them, adapters in PEFT's layout too.

An adapter's own keys end in ``lora_a.weight`` (rank, in), ``lora_b.weight`` (out, rank) and
``magnitude`` (out,). For Llama, Mistral and Gemma it keeps the rows of q and k with the two halves
of every head one among the other; a whole model does not say which it is, and the base has to. The
export in PEFT's layout brings B back to Hugging Face's order, but not the
magnitudes; and it does so for Qwen too, whose rows never were in another order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Self

from wda.checkpoints.adapter import Adapter
from wda.checkpoints.factors import Names, sort_names
from wda.checkpoints.forms import Decomposed, Factors, Form, Stored
from wda.checkpoints.found import CONFIG_FILE, Found
from wda.checkpoints.full import FullCheckpoint
from wda.checkpoints.fused_forms import Reordered, Rows, Share
from wda.checkpoints.respelled import RespelledModel
from wda.errors import CheckpointError
from wda.places import Place

_OWN = {
    "A": re.compile(r"\.lora_a\.weight$"),
    "B": re.compile(r"\.lora_b\.weight$"),
    "magnitude": re.compile(r"\.magnitude$"),
}
_EXPORTED = {
    "A": re.compile(r"\.lora_A\.weight$"),
    "B": re.compile(r"\.lora_B\.weight$"),
    "magnitude": re.compile(r"\.lora_magnitude_vector(\.weight)?$"),
}
# All that torchtune writes into an adapter_config.json; PEFT itself writes dozens of fields.
_FIELDS = {"r", "lora_alpha", "target_modules", "peft_type"}

_WORDS = {
    "attn": "self_attn",
    "output_proj": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}
_OUTSIDE = {"output": "lm_head", "tok_embeddings": "model.embed_tokens"}
_MODEL = re.compile(r"layers\.\d+\.attn\.output_proj\.weight")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_TURNED = (".attn.q_proj", ".attn.k_proj")
# What Hugging Face fuses for some models → what it holds here.
_FUSED = {
    "self_attn.qkv_proj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.w1", "mlp.w3"),
}

# model_type in a config.json → whether torchtune pairs the rows of queries and keys that its rotary
# embedding turns together as neighbours.
PAIRED = {
    "llama": True,
    "mistral": True,
    "gemma": True,
    "gemma2": True,
    "qwen2": False,
    "qwen3": False,
}


class TorchtuneCheckpoint(Adapter):
    """A folder of an epoch, or its ``adapter_model.pt``."""

    layout = "torchtune adapter"
    evidence = "names ending in lora_a.weight, or an adapter_config.json of r, lora_alpha, … alone"
    step_files = re.compile(r"(?:epoch|step)_(\d+)")

    @classmethod
    def open(cls, found: Found) -> Self | None:
        """Open what has torchtune's names, or its export's configuration."""
        own = any(map(_OWN["A"].search, found.tensors))
        exported = set(found.config) - {"base_model_name_or_path"} == _FIELDS
        if not own and not exported:
            return None
        alpha = found.given.alpha if found.given.alpha else found.config.get("lora_alpha")
        if alpha is None:
            raise CheckpointError(
                f"{found.path}: no {CONFIG_FILE} beside it that has lora_alpha, which the scaling "
                "needs; give it: --alpha, or alpha in a manifest"
            )
        names = sort_names(found.path, found.tensors, _OWN if own else _EXPORTED)
        forms = {
            _hugging_face_name(module): form
            for module, form in names.forms(lambda m: float(alpha) / names.rank(m)).items()
        }
        arrange = _in_order if own else _repaired
        for module in [m for m in forms if m.endswith(("q_proj", "k_proj"))]:
            forms[module] = arrange(forms[module], _heads(found))
        _require_all(names)
        method = "dora" if names["magnitude"] else "lora"
        base = found.config.get("base_model_name_or_path") or None
        return cls(found, found.tensors, forms, method, names.frozen, base)


class TorchtuneModel(RespelledModel):
    """The file of a whole model in torchtune's own names, or the folder of an epoch with one."""

    layout = "torchtune model"
    evidence = "names such as layers.0.attn.output_proj.weight"
    step_files = TorchtuneCheckpoint.step_files

    @classmethod
    def open(cls, found: Found) -> Self | None:
        """Open what has torchtune's names."""
        if found.file is None or not any(map(_MODEL.fullmatch, found.tensors)):
            return None
        return cls(found, found.tensors)

    def paths_in(self, base: FullCheckpoint) -> Mapping[str, str] | None:
        """Give Hugging Face's path of every module; projections that it fuses are one."""
        if any(_MODEL.fullmatch(f"{module}.weight") for module in base.modules):
            return None
        fused = [word for word in _FUSED if any(m.endswith(f".{word}") for m in base.modules)]
        parts = {part for word in fused for part in _FUSED[word]}
        apart = [m for m in sorted(self.modules) if m.split(".", 2)[-1] not in parts]
        layers = {m.group(1) for m in map(_LAYER.match, self.modules) if m}
        return {module: _hugging_face_name(module) for module in apart} | {
            f"layers.{n}.{word}": f"model.layers.{n}.{word}" for n in layers for word in fused
        }

    def pieces(self, module: str) -> tuple[Stored, ...]:
        """Give the tensors of a module, which are several where Hugging Face fuses them."""
        layer = _LAYER.match(module)
        parts = _FUSED.get(layer.group(2), ()) if layer else ()
        if layer is None or not parts:
            return super().pieces(module)
        start = f"layers.{layer.group(1)}"
        return tuple(Stored(self.tensors, f"{start}.{part}.weight") for part in parts)

    def placed(self, module: str, base: FullCheckpoint) -> tuple[Stored, ...]:
        """Give queries and keys in Hugging Face's order of rows, which depends on the model."""
        (first, *others) = self.pieces(module)
        if not module.endswith(_TURNED) or self.paths_in(base) is None:
            return (first, *others)
        paired, apart = _order_of(base.config, base.path)(first.shape[0])
        return (_reordered(first, apart) if paired else first,)

    def gathers(self, module: str) -> bool:
        """Tell whether rows of a module are picked from whole tensors."""
        return module.endswith(_TURNED) or super().gathers(module)

    def meaning(self, module: str) -> tuple[object, ...] | None:
        """Give what all models tell; nothing where the base tells the order of rows."""
        return None if module.endswith(_TURNED) else super().meaning(module)


def _hugging_face_name(module: str) -> str:
    """Give Hugging Face's name of one of torchtune's modules."""
    if not module.startswith("layers."):
        return _OUTSIDE.get(module, module)
    return ".".join(["model", *(_WORDS.get(word, word) for word in module.split("."))])


def _require_all(names: Names) -> None:
    if names["magnitude"]:
        names.require_magnitudes(names["A"], "a magnitude is missing", "save it again")


def _heads(found: Found) -> Callable[[int], tuple[bool, Rows]]:
    """Tell of so many rows whether torchtune interleaves them, and how Hugging Face's lie there."""
    return _order_of(found.json("config.json"), found.folder)


def _order_of(config: Mapping[str, Any], place: Place) -> Callable[[int], tuple[bool, Rows]]:
    """Tell the same by a ``config.json``, which lies at a place."""
    kind, size = str(config.get("model_type")), head_size(config)
    if kind not in PAIRED or not size:
        raise CheckpointError(
            f"{place}: the order of torchtune's rows of q and k depends on the model, and "
            f"is known for {', '.join(PAIRED)}, by the size of a head; the config.json in this "
            f"folder says {config.get('model_type')!r} and {size or 'no size'}; copy the base's "
            "here if it is not"
        )

    def order(rows: int) -> tuple[bool, Rows]:
        if rows % size:
            raise CheckpointError(
                f"{place}: q or k has {rows} rows, which are no heads of {size}, as "
                "config.json says; copy the base's here if it is not"
            )
        return PAIRED[kind], halves(rows, size)

    return order


def head_size(config: Mapping[str, Any]) -> int | None:
    """Tell how many rows a head has; None where a ``config.json`` does not say."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    size = config.get("head_dim") or (width // heads if heads and width else None)
    return None if size is None else int(size)


def halves(rows: int, size: int) -> Rows:
    """Tell which rows come one behind the other where those of every head lie pair by pair."""
    return tuple(range(s + half, s + size, 2) for s in range(0, rows, size) for half in (0, 1))


def _in_order(form: Form, order: Callable[[int], tuple[bool, Rows]]) -> Form:
    """Bring a form in torchtune's order of rows to Hugging Face's."""
    interleaved, apart = order(form.shape[0] or 0)
    return Share(form, apart) if interleaved else form


def _repaired(form: Form, order: Callable[[int], tuple[bool, Rows]]) -> Form:
    """Undo what the export does to the magnitudes of some models, and to B of the others."""
    interleaved, apart = order(form.shape[0] or 0)
    factors = form.inner if isinstance(form, Decomposed) else form
    assert isinstance(factors, Factors)
    if not interleaved:
        size = 2 * len(apart[0])
        back = tuple(
            range(start + i, start + size, size // 2)
            for start in range(0, form.shape[0] or 0, size)
            for i in range(size // 2)
        )
        factors = Factors(factors.A, _reordered(factors.B, back), factors.scaling)
    if not isinstance(form, Decomposed):
        return factors
    magnitude = _reordered(form.magnitude, apart) if interleaved else form.magnitude
    return Decomposed(factors, magnitude)


def _reordered(stored: Stored, order: Rows) -> Reordered:
    return Reordered(stored.tensors, stored.name, order=order)
