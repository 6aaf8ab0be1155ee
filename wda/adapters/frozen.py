"""Frozen layers seen as matrices: what an adapter has to know of the layer it goes into.

Every layer here applies a matrix W0 of shape (out_features, features) to its input, and B·A with
factors of rank r can be applied beside it in two steps, through r features in the middle.

=====================  ==========================  ==========================================
layer                  features                    B·A·x
=====================  ==========================  ==========================================
``nn.Linear``          in_features                 two linear layers
GPT-2's ``Conv1D``     in_features                 the same; the weight is stored transposed
``nn.Embedding``       num_embeddings, one-hot     a smaller embedding, then a linear layer
``nn.Conv1d, 2d``      in_channels · kernel size   the same convolution to r channels, then 1×1
=====================  ==========================  ==========================================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class Frozen(ABC):
    """A layer that stays as it is.

    Parameters
    ----------
    layer : nn.Module
        The layer.
    """

    packed: ClassVar[bool] = False

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        """Apply W0, and the bias."""
        return self.layer(x)  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        """The bias, one number per output feature, if there is one."""
        bias: Tensor | None = getattr(self.layer, "bias", None)
        return bias

    @property
    def weight(self) -> Float[Tensor, "out features"]:
        """W0."""
        return self.as_matrix(self.layer.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """Give (out, features)."""
        out_features, features = self.weight.shape
        return out_features, features

    def new_full(self, shape: tuple[int, ...], value: float) -> Tensor:
        """Make a tensor for an adapter, with the weight's dtype and device."""
        return self.weight.new_full(shape, value)

    def projected(self, A: Float[Tensor, "rank features"]) -> Float[Tensor, "out rank"]:
        """W0·Aᵀ, differentiable in A."""
        return self.weight @ A.T

    def squares(self, dim: int) -> Float[Tensor, "vectors"]:
        """‖W0‖² of every row (1) or column (0), float32 where W0 is less precise."""
        norm: Tensor = torch.linalg.vector_norm(self.weight, dim=dim, dtype=wide(self.weight))
        return norm.square()

    @abstractmethod
    def as_matrix(self, stored: Tensor) -> Float[Tensor, "out features"]:
        """See a weight as it is stored as a matrix."""

    @abstractmethod
    def as_stored(self, matrix: Float[Tensor, "out features"]) -> Tensor:
        """See a matrix as the layer stores it."""

    def as_kernels(self, A: Float[Tensor, "rank features"]) -> Tensor:
        """See the rows of A as the layer stores the weight of an output feature."""
        return A

    @abstractmethod
    def compress(self, x: Tensor, A: Float[Tensor, "rank features"]) -> Tensor:
        """A·x: the input in rank features."""

    @abstractmethod
    def expand(self, h: Tensor, B: Float[Tensor, "out rank"], shift: Tensor | None) -> Tensor:
        """B·h, and a shift of each output feature."""

    def along(self, v: Float[Tensor, "*features"]) -> Tensor:
        """Shape numbers of output features, or of ranks, so that they multiply the layer's."""
        return v

    def initialise(self, A: Tensor, B: Tensor) -> None:
        """Start trained factors as LoRA does: A Kaiming-uniform, B at zero."""
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        nn.init.zeros_(B)


class FrozenLinear(Frozen):
    """An ``nn.Linear``."""

    def as_matrix(self, stored: Tensor) -> Float[Tensor, "out features"]:
        """Give it as it is stored."""
        return stored

    def as_stored(self, matrix: Float[Tensor, "out features"]) -> Tensor:
        """Give it as it is."""
        return matrix

    def compress(self, x: Tensor, A: Float[Tensor, "rank features"]) -> Tensor:
        """A·x."""
        return functional.linear(x, A)

    def expand(self, h: Tensor, B: Float[Tensor, "out rank"], shift: Tensor | None) -> Tensor:
        """B·h, and a shift of each output feature."""
        return functional.linear(h, B, shift)


class FrozenConv1D(FrozenLinear):
    """GPT-2's ``Conv1D``, a linear layer whose weight is stored as (in, out)."""

    def as_matrix(self, stored: Tensor) -> Float[Tensor, "out features"]:
        """Transpose."""
        return stored.T

    def as_stored(self, matrix: Float[Tensor, "out features"]) -> Tensor:
        """Transpose."""
        return matrix.T


class FrozenEmbedding(FrozenLinear):
    """An ``nn.Embedding``: W0's columns are the tokens' vectors."""

    def as_matrix(self, stored: Tensor) -> Float[Tensor, "out features"]:
        """Transpose."""
        return stored.T

    def as_stored(self, matrix: Float[Tensor, "out features"]) -> Tensor:
        """Transpose."""
        return matrix.T

    def compress(self, x: Tensor, A: Float[Tensor, "rank features"]) -> Tensor:
        """A's column of every token."""
        return functional.embedding(x, A.T, self.layer.padding_idx)

    def initialise(self, A: Tensor, B: Tensor) -> None:
        """Start with A at zero, for a token sees one column of it, and B normal."""
        nn.init.zeros_(A)
        nn.init.normal_(B)


class FrozenConv(Frozen):
    """An ``nn.Conv1d`` or ``nn.Conv2d`` of one group: W0's columns are channel and place."""

    def as_matrix(self, stored: Tensor) -> Float[Tensor, "out features"]:
        """Put channels and places behind each other."""
        return stored.flatten(1)

    def as_stored(self, matrix: Float[Tensor, "out features"]) -> Tensor:
        """Put the places on axes of their own."""
        return self.as_kernels(matrix)

    def as_kernels(self, A: Float[Tensor, "rank features"]) -> Tensor:
        """Put the places on axes of their own."""
        return A.view(len(A), *self.layer.weight.shape[1:])

    def compress(self, x: Tensor, A: Float[Tensor, "rank features"]) -> Tensor:
        """Convolve, padded and with the steps of the layer, to rank channels."""
        return self.layer._conv_forward(x, self.as_kernels(A), None)  # type: ignore[no-any-return]

    def expand(self, h: Tensor, B: Float[Tensor, "out rank"], shift: Tensor | None) -> Tensor:
        """Convolve with kernels of size one, and shift each channel."""
        convolve = functional.conv1d if len(self.layer.kernel_size) == 1 else functional.conv2d
        return convolve(h, self.along(B), shift)

    def along(self, v: Float[Tensor, "*features"]) -> Tensor:
        """Put an axis of length one behind for every axis of the kernel."""
        return v[(..., *[None] * len(self.layer.kernel_size))]


def wide(weight: Tensor) -> torch.dtype:
    """Give the dtype of κ and what it is made of; in half precision κ − 1 would be lost."""
    return torch.promote_types(weight.dtype, torch.float32)


def is_conv1d(layer: nn.Module) -> bool:
    """Tell whether a layer is GPT-2's Conv1D."""
    kind = type(layer)  # by its name, for importing transformers takes seconds
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
