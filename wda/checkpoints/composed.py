"""Weights that PyTorch's modules hold under other names, or as other tensors.

``weight_norm`` holds a magnitude and a direction; ``MultiheadAttention`` queries, keys and values
in one tensor, a third each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wda.checkpoints.entry import Entry
from wda.checkpoints.tensors import ALL, Derived, Tensors

# How the names of a magnitude and of its direction end: of the function, and of what replaced it.
_NORMED = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)
_FUSED = ".in_proj_weight"
_THIRDS = ("q_proj", "k_proj", "v_proj")


def with_composed(tensors: Tensors) -> Tensors:
    """Give tensors with the weights that such parts mean, under the names they would have alone."""
    derived: dict[str, Derived] = {}
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
