"""LoRA: y = W0·x + s·B·A·x, with W0 frozen (arXiv 2106.09685).

Stabilised by its rank (rsLoRA, arXiv 2312.03732) it is the same with another s.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from wda.adapters.layer import AdaptedLayer
from wda.updates import LowRank, Update


class LoRALinear(AdaptedLayer):
    """A linear layer with a trained low-rank update beside its frozen weight.

    A starts Kaiming-uniform and B at zero, so that the layer starts as the one it wraps.

    Parameters
    ----------
    base : nn.Linear or transformers' Conv1D
        The layer to wrap; its parameters are frozen.
    rank : int
        r, the rank of the update.
    scaling : float
        s, the factor in front of B·A: α/r, or α/√r for rsLoRA.
    """

    def __init__(self, base: nn.Module, rank: int, scaling: float) -> None:
        super().__init__(base)
        self.scaling = scaling
        out_features, in_features = self.weight.shape
        # new_… keep the weight's dtype and device.
        self.A = nn.Parameter(self.weight.new_empty(rank, in_features))
        self.B = nn.Parameter(self.weight.new_zeros(out_features, rank))
        if rank > 0:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def update(self) -> Update:
        """Wt = W0 + s·B·A."""
        return LowRank(self.A, self.B, self.scaling)

    def adapted(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        """Apply W0 + s·B·A, and the bias."""
        return self.base_layer(x) + self.low_rank(x)  # type: ignore[no-any-return]

    def low_rank(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        """s·B·A·x."""
        return self.scaling * functional.linear(functional.linear(x, self.A), self.B)
