"""What one adapter is to one layer: a direction's update of low rank, and perhaps a magnitude."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wda.adapters.frozen import Frozen
from wda.updates import LowRank


class Adapter(nn.Module, ABC):
    """An update of one layer's weight.

    Parameters
    ----------
    dropout : float
        Share of the input's features that A does not see in a training step.

    Attributes
    ----------
    magnitude : nn.Parameter or None
        m, one number per output feature, where the weight is decomposed.
    """

    magnitude: nn.Parameter | None

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.register_parameter("magnitude", None)

    def seen(self, x: Tensor) -> Tensor:
        """Give what A sees of the input; of tokens, which have no features, all."""
        result: Tensor = self.dropout(x) if x.is_floating_point() else x
        return result

    @property
    @abstractmethod
    def rank(self) -> int:
        """The rank of δ; 0 where the direction is not trained."""

    @property
    @abstractmethod
    def update(self) -> LowRank:
        """δ = s·B·A, differentiable."""

    def in_training(self) -> LowRank:
        """δ = s·B·A as its length is computed in every step."""
        return self.update

    @property
    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All that the update depends on, and m."""

    @abstractmethod
    def left(self, scale: Float[Tensor, "out"] | None) -> Tensor:
        """Give what multiplies from the left in κ ⊙ s·B·A, small as it is; without κ, in s·B·A."""

    @abstractmethod
    def apply_to(
        self, frozen: Frozen, x: Tensor, left: Tensor, shift: Float[Tensor, "out"] | None = None
    ) -> Tensor:
        """Apply κ ⊙ s·B·A, given what is left in it, and shift each output feature.

        B·A is not formed.
        """


def joined(updates: Sequence[LowRank]) -> LowRank | None:
    """Give Σ δ as one; None where no direction is updated."""
    updates = [update for update in updates if len(update.A) > 0]
    if len(updates) <= 1:
        return updates[0] if updates else None
    A = torch.cat([update.A for update in updates])
    B = torch.cat([update.scaling * update.B for update in updates], dim=1)
    return LowRank(A, B, 1.0)
