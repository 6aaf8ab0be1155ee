"""VeRA: y = W0·x + λ_b ⊙ B·(λ_d ⊙ A·x), A and B random, frozen and shared (arXiv 2310.11454)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wda.adapters.adapter import Adapter
from wda.adapters.frozen import Frozen
from wda.updates import LowRank

# What λ_d starts at; λ_b starts at zero.
INITIAL = 0.1


class Projections(nn.Module):
    """The random A and B of which every layer takes as much as it is large.

    Both are Kaiming-uniform for a ReLU, as the method's authors and PEFT draw them.

    Parameters
    ----------
    layers : iterable of Frozen
        The layers that share them.
    rank : int
        r.
    """

    A: Tensor
    B: Tensor

    def __init__(self, layers: Iterable[Frozen], rank: int) -> None:
        super().__init__()
        layers = list(layers)
        most_out, most_features = (
            max(sizes) for sizes in zip(*(layer.shape for layer in layers), strict=True)
        )
        A, B = torch.empty(rank, most_features), torch.empty(most_out, rank)
        for factor in (A, B):
            nn.init.kaiming_uniform_(factor)
        like = layers[0].new_full((), 0.0)
        # Every layer would repeat them in a state dict; the adapter's file holds them once.
        self.register_buffer("A", A.to(like), persistent=False)
        self.register_buffer("B", B.to(like), persistent=False)


class VeRA(Adapter):
    """An update of which two vectors are trained, δ = diag(λ_b)·B·diag(λ_d)·A.

    It starts at zero, so that the layer starts as it was.

    Parameters
    ----------
    frozen : Frozen
        The layer it goes into.
    projections : Projections
        A and B, shared with other layers.
    dropout : float
        Share of the input's features that A does not see in a training step.
    """

    def __init__(self, frozen: Frozen, projections: Projections, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.projections = projections  # a module, not its tensors, so that moving keeps it shared
        self._shape = frozen.shape
        self.lambda_d = nn.Parameter(frozen.new_full((len(projections.A),), INITIAL))
        self.lambda_b = nn.Parameter(frozen.new_full((self._shape[0],), 0.0))

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return len(self.lambda_d)

    def projected(self) -> tuple[Float[Tensor, "rank features"], Float[Tensor, "out rank"]]:
        """Give A and B, as many columns and rows of the shared ones as the layer has."""
        out_features, features = self._shape
        return self.projections.A[:, :features], self.projections.B[:out_features]

    @property
    def update(self) -> LowRank:
        """δ = [λ_b ⊙ B]·[λ_d ⊙ A], in float64: no dtype that is stored rounds the products."""
        A, B = (factor.double() for factor in self.projected())
        return LowRank(self.lambda_d[:, None] * A, self.lambda_b[:, None] * B, 1.0)

    def in_training(self) -> LowRank:
        """δ = [λ_b ⊙ B ⊙ λ_d]·A, with the A that never changes."""
        A, B = self.projected()
        return LowRank(A, self.lambda_b[:, None] * B * self.lambda_d, 1.0)

    @property
    def tensors(self) -> list[Tensor]:
        """λ_d, λ_b, A, B and perhaps m."""
        tensors = (self.lambda_d, self.lambda_b, *self.projected(), self.magnitude)
        return [t for t in tensors if t is not None]

    def left(self, scale: Float[Tensor, "out"] | None) -> Float[Tensor, "out"]:
        """Give κ ⊙ λ_b: r is large here, so the features are scaled, not B."""
        return self.lambda_b if scale is None else (scale * self.lambda_b).to(self.lambda_b.dtype)

    def apply_to(
        self, frozen: Frozen, x: Tensor, left: Tensor, shift: Float[Tensor, "out"] | None = None
    ) -> Tensor:
        """Apply κ ⊙ λ_b ⊙ B·(λ_d ⊙ A·x), and shift."""
        A, B = self.projected()
        hidden = frozen.along(self.lambda_d) * frozen.compress(self.seen(x), A)
        out = frozen.along(left) * frozen.expand(hidden, B, None)
        return out if shift is None else out + frozen.along(shift)
