"""Factors of a convolution with the kernel between them: Tucker's decomposition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from wda.checkpoints.forms import Factors, Stored, Wanted
from wda.updates import LowRank


@dataclass(frozen=True)
class CoredFactors(Factors):
    """W0 + s·B·(core × A), where the core has a kernel for each pair of ranks.

    Attributes
    ----------
    core : Stored
        The kernels, (rank, rank, kh, kw); the columns of A are channels.
    """

    core: Stored

    words: ClassVar[str] = "factors with a core"

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The three tensors."""
        return self.A, self.B, self.core

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.B.shape[0], self.A.shape[1] * (self.core.shape[1] // self.A.shape[0])

    def update(self, wanted: Wanted) -> LowRank:
        """Give the update of the wanted rows: the core and A make one factor."""
        a = self.A.read().double()
        core = self.core.read().double().reshape(self.core.shape[0], len(a), -1)
        return LowRank(
            torch.einsum("rsk,si->rik", core, a).flatten(1),
            self.B.read(wanted.stored_rows),
            self.scaling,
        )
