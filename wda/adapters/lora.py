"""LoRA: y = W0·x + s·B·A·x, with W0 frozen (arXiv 2106.09685).

Stabilised by its rank (rsLoRA, arXiv 2312.03732) it is the same with another s.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from wda.adapters.adapter import Adapter, joined
from wda.adapters.frozen import Frozen
from wda.updates import LowRank, Update


class LoRA(Adapter):
    """A trained update of low rank, δ = s·B·A.

    It starts at zero, so that the layer starts as it was.

    Parameters
    ----------
    frozen : Frozen
        The layer it goes into.
    rank : int
        r, the rank of the update.
    scaling : float
        s, the factor in front of B·A: α/r, or α/√r for rsLoRA.
    dropout : float
        Share of the input's features that A does not see in a training step.
    """

    def __init__(self, frozen: Frozen, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.scaling = scaling
        out_features, features = frozen.shape
        self.A = nn.Parameter(frozen.new_full((rank, features), 0.0))
        self.B = nn.Parameter(frozen.new_full((out_features, rank), 0.0))
        frozen.initialise(self.A, self.B)

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return len(self.A)

    @property
    def update(self) -> LowRank:
        """δ = s·B·A."""
        return LowRank(self.A, self.B, self.scaling)

    @property
    def tensors(self) -> list[Tensor]:
        """A, B and perhaps m."""
        return [t for t in (self.A, self.B, self.magnitude) if t is not None]

    def left(self, scale: Float[Tensor, "out"] | None) -> Float[Tensor, "out rank"]:
        """Give κ ⊙ s·B."""
        factor = self.scaling if scale is None else (self.scaling * scale)[:, None]
        return (factor * self.B).to(self.B.dtype)

    def apply_to(
        self, frozen: Frozen, x: Tensor, left: Tensor, shift: Float[Tensor, "out"] | None = None
    ) -> Tensor:
        """Apply [κ ⊙ s·B]·A, and shift."""
        return frozen.expand(frozen.compress(self.seen(x), self.A), left, shift)


class Added:
    """How updates without magnitudes join: Wt = W0 + Σ s·B·A.

    Parameters
    ----------
    adapters : sequence of Adapter
        Those that take part.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = adapters

    def __call__(self, frozen: Frozen, x: Tensor) -> Tensor:
        """Apply Wt, and the bias."""
        out = frozen(x)
        for adapter in self.adapters:
            out = (out + adapter.apply_to(frozen, x, adapter.left(None))).to(out.dtype)
        return out

    def update(self, frozen: Frozen) -> Update | None:  # noqa: ARG002
        """Give what turns W0 into Wt; None where there is nothing."""
        return joined([adapter.update for adapter in self.adapters])

    def forget(self) -> None:
        """Drop what was kept: nothing is."""
