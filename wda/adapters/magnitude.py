"""Magnitude-only: y = m ⊙ W0·x/‖W0‖, DoRA whose direction stays (arXiv 2402.09353, Table 6)."""

from __future__ import annotations

from torch import nn

from wda.adapters.dora import DoRALinear


class MagnitudeLinear(DoRALinear):
    """A linear layer of which only the length of each output feature's weights is trained.

    It is DoRA of rank 0.

    Parameters
    ----------
    base : nn.Linear or transformers' Conv1D
        The layer to wrap; its parameters are frozen.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base, rank=0, scaling=1.0)
        self.A.requires_grad_(False)
        self.B.requires_grad_(False)
