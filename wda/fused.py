"""Projections that hold several matrices in one: which output features are which.

What can be told from names and shapes alone is GPT-2's; for the others the model's ``config.json``
says of which kind it is, and how many heads it has. Kinds that interleave the heads of query, key
and value are left whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ATTENTION = ("query", "key", "value")

# Kind of model → the projection whose output features are query, key and value in this order.
_QUERY_KEY_VALUE = {
    "baichuan": "W_pack",
    "dbrx": "Wqkv",
    "modernbert": "Wqkv",
    "mpt": "Wqkv",
    "phi3": "qkv_proj",
}

# Kind of model → the projection whose output features are gate and up, half and half.
_GATE_UP = {"glm": "gate_up_proj", "glm4": "gate_up_proj", "phi3": "gate_up_proj"}

_GPT2 = "c_attn"

# Last names of modules that may hold more than one matrix.
NAMES = frozenset({_GPT2, *_QUERY_KEY_VALUE.values(), *_GATE_UP.values()})


def parts(name: str, shape: tuple[int, int], config: Mapping[str, Any]) -> dict[str, range]:
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
        Label → output features; empty for a projection that is one matrix, or that cannot be split.
    """
    kind, (rows, features) = str(config.get("model_type")), shape
    if name == _GPT2:
        return _gpt2(rows, features, config)
    if _GATE_UP.get(kind) == name and rows % 2 == 0:
        return {"gate": range(rows // 2), "up": range(rows // 2, rows)}
    if _QUERY_KEY_VALUE.get(kind) == name:
        return _query_key_value(rows, config)
    return {}


def _gpt2(rows: int, features: int, config: Mapping[str, Any]) -> dict[str, range]:
    if config.get("model_type") == "gpt_bigcode":
        # With a key for every head, the heads are interleaved.
        return _query_key_value(rows, config) if config.get("multi_query", True) else {}
    count = rows // features if rows % features == 0 else 0
    labels = {2: ATTENTION[1:], 3: ATTENTION}.get(count, ())
    return {label: range(i * features, (i + 1) * features) for i, label in enumerate(labels)}


def _query_key_value(rows: int, config: Mapping[str, Any]) -> dict[str, range]:
    """Split by the width of all query heads; keys and values share what is left."""
    heads = _first(config, "num_attention_heads", "n_heads", "n_head")
    width = _first(config, "hidden_size", "d_model", "n_embd")
    size = config.get("head_dim") or (width // heads if heads and width else 0)
    query = (heads or 0) * size
    left = rows - query
    if not query or left <= 0 or left % 2:
        return {}
    middle = query + left // 2
    return {"query": range(query), "key": range(query, middle), "value": range(middle, rows)}


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    return next((int(config[name]) for name in names if config.get(name)), None)
