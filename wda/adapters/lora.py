"""LoRA: y = W0·x + s·B·A·x, with W0 frozen (arXiv 2106.09685)."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class LoRALinear(nn.Module):
    """A linear layer with a trained low-rank update beside its frozen weight.

    A starts Kaiming-uniform and B at zero, so that the layer starts as the one it wraps.

    Parameters
    ----------
    base : nn.Linear
        The layer to wrap; its parameters are frozen.
    rank : int
        r, the rank of the update.
    scaling : float
        s, the factor in front of B·A.
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.scaling = scaling
        # new_… keep the weight's dtype and device.
        self.A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        """Apply W0 + s·B·A, and the bias."""
        return self.base_layer(x) + self._low_rank(x)  # type: ignore[no-any-return]

    def _low_rank(self, x: Tensor) -> Tensor:
        """s·B·A·x."""
        return self.scaling * functional.linear(functional.linear(x, self.A), self.B)
