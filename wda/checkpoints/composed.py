"""Weights that PyTorch's modules hold under other names, or as other tensors.

``weight_norm`` holds a magnitude and a direction; ``MultiheadAttention`` queries, keys and values
in one tensor, a third each; some mixtures of experts all experts in one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wda.checkpoints.entry import Derived, Entry
from wda.checkpoints.tensors import ALL, Tensors

# How the names of a magnitude and of its direction end: of the function, and of what replaced it.
_NORMED = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)
_FUSED = ".in_proj_weight"
_THIRDS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class _Experts:
    """How a kind of model stores the matrices of all experts of a layer.

    Attributes
    ----------
    gate_up, down : str
        How the names of the two tensors end.
    turned : bool
        Whether each matrix is stored as (in, out).
    alternating : bool
        Whether gate and up take turns, output feature by output feature, rather than halves.
    """

    gate_up: str
    down: str
    turned: bool
    alternating: bool = False


_LLAMA_4 = _Experts(".experts.gate_up_proj", ".experts.down_proj", turned=True)
_GPT_OSS = replace(_LLAMA_4, alternating=True)
_GRANITE = _Experts(".input_linear.weight", ".output_linear.weight", turned=False)
_KINDS = {
    "llama4": _LLAMA_4,
    "llama4_text": _LLAMA_4,
    "gpt_oss": _GPT_OSS,
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
}


# MLX stacks the experts of all models; those it converts from have them apart.
_OF_MLX = re.compile(r"(.*)\.switch_mlp\.(\w+)_proj\.(lora_[ab]|weight)")
_MIXTRAL = {"gate": "w1", "down": "w2", "up": "w3"}


def with_composed(tensors: Tensors, config: Callable[[], Mapping[str, Any]]) -> Tensors:
    """Give tensors with the weights that such parts mean, under the names they would have alone.

    Parameters
    ----------
    tensors : Tensors
        What is stored.
    config : callable
        Gives the model's ``config.json``, which tells how experts lie in one tensor.
    """
    derived: dict[str, Derived] = _of_experts(tensors, config)
    for name in tensors:
        for of_magnitude, of_direction in _NORMED:
            path = name.removesuffix(of_magnitude)
            if path != name and (path == "" or path.endswith(".")):
                direction = f"{path}{of_direction}"
                if direction in tensors:
                    derived[f"{path}weight"] = Derived((name, direction), _normed)
        if name.endswith(_FUSED):
            path = name.removesuffix(_FUSED)
            for third, part in enumerate(_THIRDS):
                derived[f"{path}.{part}.weight"] = Derived((name,), _third(third))
    return tensors.with_derived(derived) if derived else tensors


def of_mlx_expert(name: str, expert: int) -> str | None:
    """Name an expert's slice of what MLX stacks as the model that was converted has it."""
    if (stacked := _OF_MLX.fullmatch(name)) is None:
        return None
    path, kind, part = stacked.groups()
    word = _MIXTRAL.get(kind, kind) if path.endswith("block_sparse_moe") else f"{kind}_proj"
    return f"{path}.experts.{expert}.{word}.{part}"


def _of_experts(tensors: Tensors, config: Callable[[], Mapping[str, Any]]) -> dict[str, Derived]:
    """Give the matrices of each expert, where a kind of model that is known stores all in one."""
    endings = tuple({ending for kind in _KINDS.values() for ending in (kind.gate_up, kind.down)})
    names = [name for name in tensors if name.endswith(endings)]
    kind = _KINDS.get(str(config().get("model_type"))) if names else None
    derived: dict[str, Derived] = {}
    for name in names if kind else ():
        assert kind is not None
        shape = tensors[name].shape
        if len(shape) != 3 or not name.endswith((kind.gate_up, kind.down)):
            continue
        up = name.endswith(kind.gate_up)
        path = name.removesuffix(kind.gate_up if up else kind.down)
        out = shape[2] if kind.turned else shape[1]
        parts = {"down_proj": slice(None)}
        if up and kind.alternating:
            parts = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
        elif up:
            parts = {"gate_proj": slice(0, out // 2), "up_proj": slice(out // 2, None)}
        for expert in range(shape[0]):
            for part, features in parts.items():
                made = Derived((name,), _expert(expert, features, kind.turned))
                derived[f"{path}.experts.{expert}.{part}.weight"] = made
    return derived


def _expert(expert: int, features: slice, turned: bool) -> Callable[[Sequence[Entry]], Entry]:
    """Tell how some output features of one expert are read."""

    def make(parts: Sequence[Entry]) -> Entry:
        (stacked,) = parts
        out, width = stacked.shape[:0:-1] if turned else stacked.shape[1:]
        size = len(range(*features.indices(out)))

        def read(rows: slice) -> Tensor:
            matrix = stacked.read(slice(expert, expert + 1))[0]
            return (matrix.T if turned else matrix)[features][rows]

        stored = f"{stacked.stored} expert {expert} {features}"
        return Entry((size, width), stacked.file, read, stacked.nbytes // stacked.shape[0], stored)

    return make


def _normed(parts: Sequence[Entry]) -> Entry:
    """Give g·v/‖v‖; where g has more than one number, ‖v‖ goes over all other dimensions."""
    g, v = parts

    def read(rows: slice) -> Tensor:
        magnitude = g.read(ALL).double()
        others = [i for i, size in enumerate(magnitude.shape) if size == 1]
        along = 0 not in others and magnitude.ndim == len(v.shape)
        direction = v.read(rows if along else ALL).double()
        dims = others if magnitude.ndim else None
        weight: Tensor = direction / torch.linalg.vector_norm(direction, dim=dims, keepdim=True)
        weight = weight * (magnitude[rows] if along else magnitude)
        return (weight if along else weight[rows]).to(v.read(slice(0, 0)).dtype)

    stored = f"{v.stored.split()[0]} weight norm of {g.stored} and {v.stored}"
    return Entry(v.shape, v.file, read, v.nbytes, stored)


def _third(third: int) -> Callable[[Sequence[Entry]], Entry]:
    """Tell how one of three equal parts of a tensor is read."""

    def make(parts: Sequence[Entry]) -> Entry:
        (whole,) = parts
        size = whole.shape[0] // 3

        def read(rows: slice) -> Tensor:
            first, last, _ = rows.indices(size)
            return whole.read(slice(third * size + first, third * size + max(first, last)))

        stored = f"{whole.stored} third {third}"
        return Entry((size, *whole.shape[1:]), whole.file, read, whole.nbytes // 3, stored)

    return make
