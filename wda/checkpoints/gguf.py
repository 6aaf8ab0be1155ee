"""GGUF files of llama.cpp, under the names and in the order of transformers.

The types of numbers, packed or not, are those of the package ``gguf``, which reads them. llama.cpp
orders the output features of a llama's queries and keys for its own way of rotating them; here they
are in the order of the model they were made from.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wda.checkpoints.entry import Entry, WeightFile, state_of
from wda.checkpoints.tensors import Tensors, damaged
from wda.errors import CheckpointError, MissingExtraError

ENDING = ".gguf"

# Architectures whose matrices bear llama's names in transformers.
_ARCHITECTURES = ("gemma2", "llama", "qwen2", "qwen3")
_REORDERED = ("llama",)

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


def open_gguf(path: Path) -> Tensors:
    """Open a GGUF file of a whole model.

    Raises
    ------
    CheckpointError
        When it is damaged, an adapter, or of an architecture whose names are not known.
    MissingExtraError
        When the package ``gguf`` is not installed.
    """
    try:
        import gguf  # noqa: PLC0415 - an extra
    except ImportError:
        raise MissingExtraError(
            f"{path}: reading GGUF needs gguf, which is not installed; "
            "try: pip install 'weight-decomposition-analysis[gguf]'"
        ) from None
    try:
        state, reader = state_of(path), gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        damaged(path, error)

    def told(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    architecture = told("general.architecture")
    if told("general.type") == "adapter":
        raise CheckpointError(
            f"{path}: is an adapter, which says neither its patterns of alpha nor the number of "
            "heads; give the adapter that it was converted from"
        )
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"{path}: its architecture is {architecture}; of GGUF, those are read that are named "
            f"as llama is: {', '.join(_ARCHITECTURES)}; give the model it was converted from"
        )
    heads = told(f"{architecture}.attention.head_count")
    of_keys = told(f"{architecture}.attention.head_count_kv")
    entries = {}
    for tensor in reader.tensors:
        counts = {"attn_q": heads, "attn_k": heads if of_keys is None else of_keys}
        match = _NAME.fullmatch(tensor.name)
        turned = counts.get(match[2]) if match and architecture in _REORDERED else None
        if isinstance(turned, list) and match:
            turned = turned[int(match[1])]
        entries[_name(tensor.name)] = _entry(tensor, path, gguf.dequantize, turned)
    file = WeightFile(path, entries, int(reader.data_offset), state)
    return Tensors(dict.fromkeys(entries, path), path, [file])


def packed_as(tensors: Tensors) -> str | None:
    """Tell the type of most of a file's packed tensors; None where none is packed."""
    types = [tensors[name].stored.split()[0] for name in tensors]
    packed = [kind for kind in types if kind not in ("f16", "bf16", "f32", "f64")]
    return max(sorted(set(packed)), key=packed.count) if packed else None


def _name(name: str) -> str:
    """Give a tensor's name in transformers; one that has none there keeps its own."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in _NAMES:
        return name
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{_NAMES[match[2]]}.{match[3]}"


def _entry(tensor: Any, path: Path, dequantize: Callable[..., Any], heads: int | None) -> Entry:
    """Give the entry of a tensor, whose output features may be ordered for rotating them."""
    shape = tuple(int(size) for size in tensor.shape[::-1])
    order = None if heads is None else _order(shape[0], heads)

    def read(rows: slice) -> Tensor:
        stored = tensor.data[rows] if order is None else tensor.data[order[rows].numpy()]
        kind = tensor.tensor_type
        if kind.name in ("F16", "F32", "F64"):
            return torch.from_numpy(stored.copy())
        return torch.from_numpy(dequantize(stored, kind).copy())

    stored = f"{tensor.tensor_type.name.lower()} {tensor.data_offset} {heads}"
    return Entry(shape, path, read, 4 * int(tensor.n_elements), stored)


def _order(out: int, heads: int) -> Tensor:
    """Tell where each output feature lies: llama.cpp puts the halves of a head into pairs."""
    return torch.arange(out).view(heads, out // heads // 2, 2).transpose(1, 2).flatten()
