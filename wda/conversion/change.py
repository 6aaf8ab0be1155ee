"""What is carried from one layout to another: factors, scaling and magnitude of every module."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wda.updates import LowRank, RowUpdate, WeightDecomposed, merged


@dataclass(frozen=True)
class Change:
    """The change of one module, as every layout of factors can say it.

    Attributes
    ----------
    module : str
        Path of the module.
    A, B : Tensor
        The factors (rank, in) and (out, rank); of rank 0 where the magnitude alone is trained.
    scaling : float
        The factor s before B·A.
    magnitude : Tensor or None
        m of every output feature.
    kernel : tuple of int
        Height and width of the kernel of a convolution, which A holds laid flat.
    """

    module: str
    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.A.shape[0]

    @property
    def alpha(self) -> float:
        """α = s·r; an integer where it is one, for so they are written."""
        alpha = self.scaling * self.rank
        return round(alpha) if abs(alpha - round(alpha)) <= 1e-14 * abs(alpha) else alpha

    @property
    def update(self) -> RowUpdate:
        """The update of W0 that this is."""
        low_rank = LowRank(self.A, self.B, self.scaling)
        return low_rank if self.magnitude is None else WeightDecomposed(low_rank, self.magnitude)

    def padded(self, rank: int) -> Change:
        """Give the same change with factors of a higher rank: zeros are added."""
        more = rank - self.rank
        a = torch.cat([self.A, self.A.new_zeros(more, self.A.shape[1])])
        b = torch.cat([self.B, self.B.new_zeros(self.B.shape[0], more)], dim=1)
        return replace(self, A=a, B=b)

    def rescaled(self, scaling: float) -> Change:
        """Give the same change with another factor s, as far as B's dtype can hold it."""
        b = (self.B.double() * (self.scaling / scaling)).to(self.B.dtype)
        return replace(self, B=b, scaling=scaling)

    def decomposed(self, w0: Tensor, dtype: torch.dtype) -> Change:
        """Give the same change with the magnitude that leaves it as it is: ‖W0 + s·B·A‖."""
        low_rank = LowRank(self.A, self.B, self.scaling)
        magnitude = torch.linalg.vector_norm(merged(low_rank, w0), dim=1)
        return replace(self, magnitude=magnitude.to(dtype))


@dataclass(frozen=True)
class Weight:
    """A module that was trained whole beside the adapter.

    Attributes
    ----------
    module : str
        Path of the module.
    tensors : dict
        Its weight, and its bias where the adapter has that, as they are stored.
    """

    module: str
    tensors: dict[str, Tensor]


def truncated(
    module: str, delta: Tensor, rank: int, scaling: float, kernel: tuple[int, ...]
) -> Change:
    """Give the change of a rank that comes next to a difference: its truncated SVD, in float32."""
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    a, b = root[:, None] * vh[:rank], u[:, :rank] * root
    return Change(module, a.float(), b.float(), scaling, kernel=kernel)
