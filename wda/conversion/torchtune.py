"""Adapters as torchtune reads them: its names, and its order of the rows of queries and keys."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from wda.checkpoints.torchtune import PAIRED, head_size
from wda.conversion.change import Change, Weight
from wda.conversion.files import save_config, save_json, save_pickle
from wda.conversion.source import Source
from wda.conversion.target import Target
from wda.errors import ConversionError

# The order of rows cannot be told without the last.
_FILES = ("adapter_model.pt", "adapter_config.json", "config.json")

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
_TURNED = (".q_proj", ".k_proj")
_WHY = "the order of rows that torchtune keeps"


def _missing(source: Source, module: str) -> str | None:
    config = source.base(_WHY).config
    kind = config.get("model_type")
    if kind not in PAIRED:
        return f"torchtune's order of rows is known for {', '.join(PAIRED)}, not for {kind}"
    if module.endswith(_TURNED) and head_size(config) is None:
        return (
            "the base's config.json does not say how many rows a head has: it has no head_dim, and "
            "not both of hidden_size and num_attention_heads"
        )
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
        path, heads = _name(change.module), _heads(config, change)
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


def _heads(config: Mapping[str, Any], change: Change) -> int | None:
    """Give the number of heads in which the rows of a module are paired; None if in none."""
    if not change.module.endswith(_TURNED):
        return None
    rows, size = change.B.shape[0], head_size(config)
    assert size is not None
    if rows % size:
        raise ConversionError(
            f"{change.module}: its {rows} rows are no heads of {size}, as the base's config.json "
            "says; give the base it was trained on"
        )
    return rows // size if PAIRED[str(config["model_type"])] else None


def _permuted(rows: Tensor, heads: int | None) -> Tensor:
    """Bring the two halves of each head's rows, as Hugging Face keeps them, among each other."""
    if heads is None:
        return rows
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
    return halves.transpose(1, 2).reshape(rows.shape)


TORCHTUNE = Target(_FILES, _write, "all or none", one_scaling=True, missing=_missing)
