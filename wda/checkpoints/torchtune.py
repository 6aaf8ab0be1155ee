"""LoRA and DoRA adapters as torchtune writes them, in its own layout and in PEFT's.

Its own keys end in ``lora_a.weight`` (rank, in), ``lora_b.weight`` (out, rank) and ``magnitude``
(out,). For Llama, Mistral and Gemma it keeps the rows of q and k with the two halves of every head
one among the other. Its export in PEFT's layout brings B back to Hugging Face's order, but not the
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
from wda.checkpoints.fused_forms import Reordered, Rows, Share
from wda.errors import CheckpointError

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


def _hugging_face_name(module: str) -> str:
    """Give Hugging Face's name of one of torchtune's modules."""
    if module == "output":
        return "lm_head"
    if not module.startswith("layers."):
        return module
    return ".".join(["model", *(_WORDS.get(word, word) for word in module.split("."))])


def _require_all(names: Names) -> None:
    if names["magnitude"]:
        names.require_magnitudes(names["A"], "a magnitude is missing", "save it again")


def _heads(found: Found) -> Callable[[int], tuple[bool, Rows]]:
    """Tell of so many rows whether torchtune interleaves them, and how Hugging Face's lie there."""
    config: Mapping[str, Any] = found.json("config.json")
    kind, size = str(config.get("model_type")), head_size(config)
    if kind not in PAIRED or not size:
        raise CheckpointError(
            f"{found.folder}: the order of torchtune's rows of q and k depends on the model, and "
            f"is known for {', '.join(PAIRED)}, by the size of a head; the config.json in this "
            f"folder says {config.get('model_type')!r} and {size or 'no size'}; copy the base's "
            "here if it is not"
        )

    def order(rows: int) -> tuple[bool, Rows]:
        if rows % size:
            raise CheckpointError(
                f"{found.folder}: q or k has {rows} rows, which are no heads of {size}, as "
                "config.json says; copy the base's here if it is not"
            )
        starts = range(0, rows, size)
        halves = tuple(range(s + half, s + size, 2) for s in starts for half in (0, 1))
        return PAIRED[kind], halves

    return order


def head_size(config: Mapping[str, Any]) -> int | None:
    """Tell how many rows a head has; None where a ``config.json`` does not say."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    size = config.get("head_dim") or (width // heads if heads and width else None)
    return None if size is None else int(size)


def _in_order(form: Form, order: Callable[[int], tuple[bool, Rows]]) -> Form:
    """Bring a form in torchtune's order of rows to Hugging Face's."""
    interleaved, halves = order(form.shape[0] or 0)
    return Share(form, halves) if interleaved else form


def _repaired(form: Form, order: Callable[[int], tuple[bool, Rows]]) -> Form:
    """Undo what the export does to the magnitudes of some models, and to B of the others."""
    interleaved, halves = order(form.shape[0] or 0)
    factors = form.inner if isinstance(form, Decomposed) else form
    assert isinstance(factors, Factors)
    if not interleaved:
        size = 2 * len(halves[0])
        back = tuple(
            range(start + i, start + size, size // 2)
            for start in range(0, form.shape[0] or 0, size)
            for i in range(size // 2)
        )
        factors = Factors(factors.A, _reordered(factors.B, back), factors.scaling)
    if not isinstance(form, Decomposed):
        return factors
    magnitude = _reordered(form.magnitude, halves) if interleaved else form.magnitude
    return Decomposed(factors, magnitude)


def _reordered(stored: Stored, order: Rows) -> Reordered:
    return Reordered(stored.tensors, stored.name, order=order)
