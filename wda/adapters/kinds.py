"""How each kind of layer is seen as a matrix."""

from __future__ import annotations

from torch import nn

from wda.adapters.frozen import (
    Frozen,
    FrozenConv,
    FrozenConv1D,
    FrozenEmbedding,
    FrozenLinear,
    is_conv1d,
)
from wda.adapters.packed import packed_kind

_KINDS: dict[type[nn.Module], type[Frozen]] = {
    nn.Linear: FrozenLinear,
    nn.Embedding: FrozenEmbedding,
    nn.Conv1d: FrozenConv,
    nn.Conv2d: FrozenConv,
}


def kind_of(layer: nn.Module) -> type[Frozen] | None:
    """Tell how a layer is seen as a matrix; None where no adapter can go into it.

    A subclass with a forward of its own, such as an embedding that scales its vectors, is another
    layer than the one it inherits from.
    """
    if is_conv1d(layer):
        return FrozenConv1D
    if (packed := packed_kind(layer)) is not None:
        return packed
    for known, kind in _KINDS.items():
        if isinstance(layer, known) and type(layer).forward is known.forward:
            return kind
    return None
