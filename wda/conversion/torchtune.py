"""Adapters as torchtune reads them: its names, and its order of the rows of queries and keys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from wda.conversion.change import Change, Weight
from wda.conversion.files import save_config, save_json, save_pickle
from wda.conversion.source import Source
from wda.conversion.target import Target

# The order of rows cannot be told without the last.
_FILES = ("adapter_model.pt", "adapter_config.json", "config.json")

# model_type in the base's config.json → whether torchtune pairs the rows that its rotary
# embedding turns together as neighbours.
_PERMUTED = {
    "llama": True,
    "mistral": True,
    "gemma": True,
    "gemma2": True,
    "qwen2": False,
    "qwen3": False,
}
_NAMES = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}
_PATH = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
_WHY = "the order of rows that torchtune keeps"


def _missing(source: Source, module: str) -> str | None:
    kind = source.base(_WHY).config.get("model_type")
    if kind not in _PERMUTED:
        return f"torchtune's order of rows is known for {', '.join(_PERMUTED)}, not for {kind}"
    return None if _name(module) else "torchtune has no name for it"


def _name(module: str) -> str | None:
    if module == "lm_head":
        return "output"
    match = _PATH.fullmatch(module)
    if match is None or match.group(2) not in _NAMES:
        return None
    return f"layers.{match.group(1)}.{_NAMES[match.group(2)]}"


def _write(
    folder: Path, changes: Sequence[Change], _weights: Sequence[Weight], source: Source
) -> None:
    config, tensors = source.base(_WHY).config, {}
    for change in changes:
        path, heads = _name(change.module), _heads(config, change.module)
        tensors[f"{path}.lora_a.weight"] = change.A
        tensors[f"{path}.lora_b.weight"] = _permuted(change.B, heads)
        if change.magnitude is not None:
            tensors[f"{path}.magnitude"] = _permuted(change.magnitude, heads)
    save_pickle(folder / _FILES[0], tensors)
    last_names = dict.fromkeys(change.module.rpartition(".")[2] for change in changes)
    known = {
        "r": changes[0].rank,
        "lora_alpha": changes[0].alpha,
        "target_modules": list(last_names),
        "peft_type": "LORA",
    }
    base = source.adapter.base
    save_config(folder, known | ({"base_model_name_or_path": base} if base else {}))
    save_json(folder / "config.json", config)


def _heads(config: dict[str, object], module: str) -> int | None:
    """Give the number of heads among which the rows of a module are permuted; None if none are."""
    last = module.rpartition(".")[2]
    if last not in ("q_proj", "k_proj") or not _PERMUTED[str(config["model_type"])]:
        return None
    heads = config["num_attention_heads"]
    found = heads if last == "q_proj" else config.get("num_key_value_heads") or heads
    assert isinstance(found, int)
    return found


def _permuted(rows: Tensor, heads: int | None) -> Tensor:
    """Bring the two halves of each head's rows, as Hugging Face keeps them, among each other."""
    if heads is None:
        return rows
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
    return halves.transpose(1, 2).reshape(rows.shape)


TORCHTUNE = Target(_FILES, _write, "all or none", one_scaling=True, missing=_missing)
