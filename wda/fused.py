"""Projections that hold several matrices in one: which output features are which.

What can be told from names and shapes alone is GPT-2's; for the others the model's ``config.json``
says of which kind it is, and how many heads it has. Some lay all queries before all keys, others
query, key and value of a head, or of a group of heads, before those of the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ATTENTION = ("query", "key", "value")

# Kind of model → the projection that holds query, key and value.
_QUERY_KEY_VALUE = {
    "baichuan": "W_pack",
    "bloom": "query_key_value",
    "codegen": "qkv_proj",
    "dbrx": "Wqkv",
    "falcon": "query_key_value",
    "gpt_bigcode": "c_attn",
    "gpt_neox": "query_key_value",
    "litgpt": "qkv",
    "litgpt_interleaved": "attn",
    "megatron": "linear_qkv",
    "modernbert": "Wqkv",
    "mpt": "Wqkv",
    "persimmon": "query_key_value",
    "phi3": "qkv_proj",
}

# CodeGen was trained on so many devices, each of which held a share of the heads.
_CODEGEN_SHARES = 4

# Kind of model → the projection whose output features are gate and up, half and half.
_GATE_UP = {
    "glm": "gate_up_proj",
    "glm4": "gate_up_proj",
    "megatron": "linear_fc1",
    "phi3": "gate_up_proj",
}

_GPT2 = "c_attn"

# Last names of modules that may hold more than one matrix.
NAMES = frozenset({_GPT2, *_QUERY_KEY_VALUE.values(), *_GATE_UP.values()})


Parts = dict[str, tuple[range, ...]]


def parts(name: str, shape: tuple[int, int], config: Mapping[str, Any]) -> Parts:
    """Tell which output features of a projection are which matrix.

    Parameters
    ----------
    name : str
        Last name of its module.
    shape : tuple of int
        (out_features, in_features).
    config : mapping
        The model's ``config.json``; empty where there is none.

    Returns
    -------
    dict
        Label → ranges of output features; empty for a projection that is one matrix, or that cannot
        be split.
    """
    kind, (rows, features) = str(config.get("model_type")), shape
    if _GATE_UP.get(kind) == name and rows % 2 == 0:
        return _repeated(rows, 1, {"gate": rows // 2, "up": rows // 2})
    if _QUERY_KEY_VALUE.get(kind) == name:
        return _query_key_value(kind, rows, config)
    if name == _GPT2 and rows % features == 0:
        labels = {2: ATTENTION[1:], 3: ATTENTION}.get(rows // features, ())
        return _repeated(rows, 1, dict.fromkeys(labels, features))
    return {}


def _query_key_value(kind: str, rows: int, config: Mapping[str, Any]) -> Parts:
    """Split by the number of heads, and by how a kind of model lays them out."""
    heads = _first(config, "num_attention_heads", "n_heads", "n_head")
    width = _first(config, "hidden_size", "d_model", "n_embd")
    size = int(config.get("head_dim") or (width // heads if heads and width else 0))
    if not heads or not size or rows <= heads * size:
        return {}
    apart = (rows - heads * size) // 2  # of all keys, and of all values
    if kind == "codegen":
        share = rows // 3 // _CODEGEN_SHARES
        return _repeated(rows, _CODEGEN_SHARES, {"query": share, "value": share, "key": share})
    grouped = ("litgpt_interleaved", "megatron")
    if kind in grouped or (kind == "falcon" and config.get("new_decoder_architecture")):
        groups = apart // size
        return _repeated(
            rows, groups, {"query": heads // groups * size, "key": size, "value": size}
        )
    one_key = config.get("multi_query", True)
    together = kind in ("bloom", "gpt_neox", "persimmon")
    if together or (kind in ("falcon", "gpt_bigcode") and not one_key):
        return _repeated(rows, heads, dict.fromkeys(ATTENTION, size))
    return _repeated(rows, 1, {"query": heads * size, "key": apart, "value": apart})


def _repeated(rows: int, times: int, sizes: Mapping[str, int]) -> Parts:
    """Lay parts of these sizes one behind the other, several times over; nothing if they miss."""
    if times * sum(sizes.values()) != rows:
        return {}
    found: dict[str, list[range]] = {label: [] for label in sizes}
    start = 0
    for _ in range(times):
        for label, size in sizes.items():
            found[label].append(range(start, start + size))
            start += size
    return {label: tuple(ranges) for label, ranges in found.items()}


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    return next((int(config[name]) for name in names if config.get(name)), None)
