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


class BottleneckLayer(nn.Module):
    """A frozen linear layer with a bottleneck after or beside it.

    U starts at zero, so that the layer starts as it was, to the last bit.

    Parameters
    ----------
    base : nn.Linear or transformers' Conv1D
        The layer; its parameters are frozen.
    features, out_features : int
        What goes into the layer, and what comes out.
    size : int
        Features of the bottleneck.
    series : bool
        Whether it reads the layer's output; else its input.
    """

    def __init__(
        self, base: nn.Module, features: int, out_features: int, size: int, series: bool
    ) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.series = series
        weight = next(base.parameters())
        made: dict[str, Any] = {"bias": False, "dtype": weight.dtype, "device": weight.device}
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
