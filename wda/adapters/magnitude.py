"""Magnitude-only: y = m ⊙ W0·x/‖W0‖, DoRA whose direction stays (arXiv 2402.09353, Table 6)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from wda.adapters.adapter import Adapter
from wda.adapters.frozen import Frozen
from wda.updates import LowRank


class MagnitudeOnly(Adapter):
    """No update of the direction: δ = 0, of rank 0.

    Parameters
    ----------
    frozen : Frozen
        The layer it goes into.
    """

    def __init__(self, frozen: Frozen) -> None:
        super().__init__()
        self._shape = frozen.shape

    @property
    def rank(self) -> int:
        """Zero."""
        return 0

    @property
    def update(self) -> LowRank:
        """δ = 0, with factors of rank 0."""
        out_features, features = self._shape
        return LowRank(torch.empty(0, features), torch.empty(out_features, 0), 1.0)

    @property
    def tensors(self) -> list[Tensor]:
        """m alone."""  # noqa: D403
        return [] if self.magnitude is None else [self.magnitude]

    def left(self, scale: Float[Tensor, "out"] | None) -> Tensor:  # noqa: ARG002
        """Give zero."""
        assert self.magnitude is not None
        return self.magnitude.new_zeros(())

    def apply_to(
        self,
        frozen: Frozen,
        x: Tensor,  # noqa: ARG002
        left: Tensor,
        shift: Float[Tensor, "out"] | None = None,
    ) -> Tensor:
        """Shift, and nothing else."""
        return left if shift is None else frozen.along(shift)
