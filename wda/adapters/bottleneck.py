"""Series and Parallel adapters: small networks beside weights, the paper's other baselines.

Series (arXiv 1902.00751) reads what a layer puts out, y + U·tanh(D·y) with y = W0·x; Parallel
(arXiv 2110.04366) reads what goes in, y + U·tanh(D·x). They have no bias, as in the code that the
paper's figures come from (arXiv 2304.01933). No weight of the model changes, so there is nothing
to merge and nothing to compare.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wda.adapters.frozen import Frozen


class BottleneckLayer(nn.Module):
    """A frozen linear layer with a bottleneck after or beside it.

    U starts at zero, so that the layer starts as it was, to the last bit.

    Parameters
    ----------
    frozen : Frozen
        The layer, an ``nn.Linear`` or a ``Conv1D``; its parameters are frozen.
    size : int
        Features of the bottleneck.
    series : bool
        Whether it reads the layer's output; else its input.
    """

    def __init__(self, frozen: Frozen, size: int, series: bool) -> None:
        super().__init__()
        self.base_layer: nn.Module = frozen.layer.requires_grad_(False)
        self.series = series
        out_features, features = frozen.shape
        like = frozen.weight
        made: dict[str, Any] = {"bias": False, "dtype": like.dtype, "device": like.device}
        self.down = nn.Linear(out_features if series else features, size, **made)
        self.up = nn.Linear(size, out_features, **made)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, and add what passes the bottleneck."""
        out: Tensor = self.base_layer(x)
        change: Tensor = self.up(torch.tanh(self.down(out if self.series else x)))
        return out + change


def bottlenecks(model: nn.Module) -> dict[str, BottleneckLayer]:
    """Give the layers with bottlenecks by the names of their modules."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BottleneckLayer)}
