"""GGUF files of llama.cpp, under the names and in the order of transformers.

The types of numbers, packed or not, are those of the package ``gguf``, which reads them. llama.cpp
orders the output features of some models' projections for its own way of using them, and stacks
experts; here they are as in the model they were made from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wda.checkpoints.entry import Entry, WeightFile, state_of
from wda.checkpoints.fused_forms import slice_of
from wda.checkpoints.levels import even
from wda.checkpoints.tensors import ALL, Tensors, damaged
from wda.errors import CheckpointError, MissingExtraError

ENDING = ".gguf"

_LAYERS = "model.layers.{}."
_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
    "attn_q": f"{_LAYERS}self_attn.q_proj",
    "attn_k": f"{_LAYERS}self_attn.k_proj",
    "attn_v": f"{_LAYERS}self_attn.v_proj",
    "attn_output": f"{_LAYERS}self_attn.o_proj",
    "ffn_gate": f"{_LAYERS}mlp.gate_proj",
    "ffn_up": f"{_LAYERS}mlp.up_proj",
    "ffn_down": f"{_LAYERS}mlp.down_proj",
}
_HEADED = {
    "token_embd": "transformer.word_embeddings",
    "output": "lm_head",
    "output_norm": "transformer.ln_f",
    "attn_qkv": "transformer.h.{}.self_attention.query_key_value",
    "attn_output": "transformer.h.{}.self_attention.dense",
    "ffn_up": "transformer.h.{}.mlp.dense_h_to_4h",
    "ffn_down": "transformer.h.{}.mlp.dense_4h_to_h",
}
# One tensor holds this matrix of all experts; transformers' files have each apart.
_EXPERTS = {
    f"ffn_{kind}_exps": f"{_LAYERS}mlp.experts.{{}}.{kind}_proj" for kind in ("gate", "up", "down")
}
_MIXTURE = {
    **_LLAMA,
    "ffn_gate_inp": f"{_LAYERS}mlp.gate",
    "ffn_gate_inp_shexp": f"{_LAYERS}mlp.shared_expert_gate",
    **{
        f"ffn_{kind}_shexp": f"{_LAYERS}mlp.shared_expert.{kind}_proj"
        for kind in ("gate", "up", "down")
    },
}

# Architecture → what its tensors are called in transformers, by their names in llama.cpp.
_ARCHITECTURES: dict[str, dict[str, str]] = {
    "bloom": _HEADED,
    "falcon": _HEADED,
    "gemma2": _LLAMA,
    "gemma3": _LLAMA,
    "gpt2": {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output": "lm_head",
        "output_norm": "transformer.ln_f",
        "attn_qkv": "transformer.h.{}.attn.c_attn",
        "attn_output": "transformer.h.{}.attn.c_proj",
        "ffn_up": "transformer.h.{}.mlp.c_fc",
        "ffn_down": "transformer.h.{}.mlp.c_proj",
    },
    "llama": _LLAMA,
    "nemotron": _LLAMA,
    "phi3": {
        **_LLAMA,
        "attn_qkv": f"{_LAYERS}self_attn.qkv_proj",
        "ffn_up": f"{_LAYERS}mlp.gate_up_proj",
    },
    "qwen2": _LLAMA,
    "qwen2moe": _MIXTURE,
    "qwen3": _LLAMA,
    "qwen3moe": _MIXTURE,
    "stablelm": _LLAMA,
    "starcoder2": {
        **_LLAMA,
        "ffn_up": f"{_LAYERS}mlp.c_fc",
        "ffn_down": f"{_LAYERS}mlp.c_proj",
    },
}
# What transformers stores as (in, out), which llama.cpp does not.
_TURNED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
# What a file says beside its tensors.
TYPE, ARCHITECTURE, ADAPTER = "general.type", "general.architecture", "adapter"
KIND, ALPHA, INVOKED = "adapter.type", "adapter.lora.alpha", "adapter.alora.invocation_tokens"
_TOLD = (TYPE, ARCHITECTURE, KIND, ALPHA, INVOKED)
# Architectures whose adapters llama.cpp's converter leaves in order, or orders as a llama's.
OF_ADAPTERS = tuple(
    name
    for name in _ARCHITECTURES
    if name not in ("bloom", "falcon", "gpt2", "qwen2moe", "qwen3moe")
)
_FACTOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.weight\.(lora_[ab])")
_Make = Callable[..., Entry]

# Packed type → numbers that share a scale, steps from the largest to zero or to the smallest, and
# which of the two. The scales of K-quants are rounded themselves, so theirs are close, not exact.
_LEVELS = {
    "Q4_0": (32, 8, True),
    "Q5_0": (32, 16, True),
    "Q8_0": (32, 127, True),
    "Q4_1": (32, 15, False),
    "Q5_1": (32, 31, False),
    "Q2_K": (16, 3, False),
    "Q3_K": (16, 4, True),
    "Q4_K": (32, 15, False),
    "Q5_K": (32, 31, False),
    "Q6_K": (16, 32, True),
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


def open_gguf(path: Path) -> Tensors:
    """Open a GGUF file of a whole model, or of an adapter.

    Raises
    ------
    CheckpointError
        When it is damaged, or of an architecture whose names are not known.
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

    metadata = {key: str(value) for key in _TOLD if (value := told(key)) is not None}
    is_adapter = metadata.get(TYPE) == ADAPTER
    known = OF_ADAPTERS if is_adapter else tuple(_ARCHITECTURES)
    if (architecture := str(metadata.get(ARCHITECTURE))) not in known:
        raise CheckpointError(
            f"{path}: its architecture is {architecture}; of GGUF, "
            f"{'adapters of these' if is_adapter else 'these'} are read: {', '.join(known)}; give "
            f"the {'adapter' if is_adapter else 'model'} it was converted from"
        )
    make = partial(_entry, path, gguf.dequantize)
    if is_adapter:
        entries = _of_adapter(reader.tensors, architecture, make)
    else:
        heads = _heads(path, architecture, told)
        entries = _of_model(reader.tensors, architecture, heads, make)
    file = WeightFile(path, entries, int(reader.data_offset), state, metadata)
    return Tensors(dict.fromkeys(entries, path), path, [file])


def packed_as(tensors: Tensors) -> str | None:
    """Tell the type of most of a model's packed tensors; None where none is packed."""
    if tensors.metadata.get(TYPE) == ADAPTER:
        return None
    types = [tensors[name].stored.split()[0] for name in tensors]
    packed = [kind for kind in types if kind not in ("f16", "bf16", "f32", "f64")]
    return max(sorted(set(packed)), key=packed.count) if packed else None


def _of_adapter(tensors: Iterable[Any], architecture: str, make: _Make) -> dict[str, Entry]:
    """Give an adapter's factors under transformers' names of modules, in the file's order."""
    entries = {}
    for tensor in tensors:
        match = _FACTOR.fullmatch(tensor.name)
        theirs = _ARCHITECTURES[architecture].get(match[2]) if match else None
        name = f"{theirs.format(match[1])}.{match[3]}" if theirs and match else tensor.name
        entries[name] = make(tensor)
    return entries


def _heads(path: Path, architecture: str, told: Callable[[str], Any]) -> tuple[Any, Any]:
    """Give the numbers of heads of queries and of keys, each one number or one per layer."""
    heads = told(f"{architecture}.attention.head_count")
    of_keys = told(f"{architecture}.attention.head_count_kv")
    of_keys = heads if of_keys is None else of_keys
    if architecture == "falcon" and of_keys != 1:
        raise CheckpointError(
            f"{path}: a Falcon with {of_keys} heads of keys, whose groups of queries, keys and "
            "values llama.cpp reorders, is not read; give the model it was converted from"
        )
    return heads, of_keys


def _of_model(
    tensors: Iterable[Any], architecture: str, heads: tuple[Any, Any], make: _Make
) -> dict[str, Entry]:
    """Give a model's tensors under transformers' names and in its order."""
    entries = {}
    for tensor in tensors:
        match = _NAME.fullmatch(tensor.name)
        layer, kind, ending = match.groups() if match else (None, tensor.name, "")
        n = int(layer or 0)  # the number of heads may differ from layer to layer
        counts = tuple(of[n] if isinstance(of, list) else of for of in heads)
        turned = architecture == "gpt2" and kind in _TURNED and ending == "weight"
        entry = make(tensor, _order(architecture, kind, counts), turned)
        if kind in _EXPERTS and _ARCHITECTURES[architecture] is _MIXTURE:
            for expert in range(entry.shape[0]):
                name = _EXPERTS[kind].format(layer, expert)
                entries[f"{name}.{ending}"] = slice_of(expert, entry)
        else:
            theirs = _ARCHITECTURES[architecture].get(kind)
            name = f"{theirs.format(layer)}.{ending}" if theirs else tensor.name
            entries[name] = _as_row(entry) if kind == "ffn_gate_inp_shexp" else entry
    return entries


def _as_row(entry: Entry) -> Entry:
    """Give the entry of a vector as a matrix of one row, which it is in transformers."""
    shape = entry.shape if len(entry.shape) > 1 else (1, *entry.shape)
    return replace(entry, shape=shape, read=lambda rows: entry.read(ALL).reshape(shape)[rows])


def _order(architecture: str, kind: str, heads: tuple[int, int]) -> Callable[[int], Tensor] | None:
    """Tell how llama.cpp orders the output features of a tensor, if in an order of its own.

    Of a llama's queries and keys it puts the halves of a head into pairs; of a Bloom's it lays all
    queries before all keys, which transformers has head by head.
    """
    if architecture == "llama" and kind in ("attn_q", "attn_k"):
        count = heads[kind == "attn_k"]
        return lambda out: torch.arange(out).view(count, -1, 2).transpose(1, 2).flatten()
    if architecture == "bloom" and kind == "attn_qkv":
        return lambda out: torch.arange(out).view(3, heads[0], -1).transpose(0, 1).flatten()
    return None


def _entry(
    path: Path,
    dequantize: Callable[..., Any],
    tensor: Any,
    order: Callable[[int], Tensor] | None = None,
    turned: bool = False,
) -> Entry:
    """Give the entry of a tensor in transformers' order of its output features."""
    shape = tuple(int(size) for size in tensor.shape[::-1])
    kind = tensor.tensor_type
    places = order(shape[0]) if order else None

    def values(rows: slice) -> Tensor:
        stored = tensor.data[rows] if places is None else tensor.data[places[rows].numpy()]
        if kind.name not in ("F16", "F32", "F64"):
            stored = dequantize(stored, kind)
        return torch.from_numpy(stored.copy())

    def read(rows: slice) -> Tensor:
        return values(ALL).T[rows] if turned else values(rows)

    def spacings(rows: slice) -> Tensor:
        apart = even(values(ALL if turned else rows), *_LEVELS[kind.name])
        return apart.T[rows] if turned else apart

    # The same bytes in another order, or turned, are another tensor.
    second = None if places is None else int(places[1])
    stored = f"{kind.name.lower()} {tensor.data_offset} {second} {turned}"
    return Entry(
        shape[::-1] if turned else shape,
        path,
        read,
        4 * int(tensor.n_elements),
        stored,
        spacings if kind.name in _LEVELS else None,
    )
