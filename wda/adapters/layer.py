"""What all adapted layers have in common: a frozen layer, and an update that can be merged."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wda.errors import ModelError
from wda.updates import Update, merged


class AdaptedLayer(nn.Module, ABC):
    """A frozen linear layer whose weight an adapter updates.

    Merged, the frozen layer holds Wt and W0 waits beside it, so that unmerging restores W0's bits;
    that is one more copy of the weight for as long as it lasts, and it is not saved with the model.

    Parameters
    ----------
    base : nn.Linear or transformers' Conv1D
        The layer to wrap; its parameters are frozen.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self._w0: Tensor | None = None
        self.training = base.training

    @property
    def weight(self) -> Float[Tensor, "out features"]:
        """The frozen layer's weight as (out_features, in_features): W0, or Wt while merged."""
        stored = self.base_layer.weight
        assert isinstance(stored, Tensor)
        return stored.T if is_conv1d(self.base_layer) else stored

    @property
    def is_merged(self) -> bool:
        """Whether the frozen layer holds Wt."""
        return self._w0 is not None

    @property
    @abstractmethod
    def update(self) -> Update:
        """What turns W0 into Wt."""

    @abstractmethod
    def adapted(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        """Apply Wt without forming it, and the bias."""

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        """Apply Wt, and the bias.

        Raises
        ------
        ModelError
            When it is to be trained while it is merged.
        """
        if not self.is_merged:
            return self.adapted(x)
        if self.training and torch.is_grad_enabled():
            raise ModelError(
                "model: its adapters are merged and cannot be trained so; call "
                "wda.adapters.unmerge(model) first"
            )
        return self.base_layer(x)  # type: ignore[no-any-return]

    def merge(self) -> None:
        """Put Wt, computed in float64, into the frozen layer."""
        with torch.no_grad():
            wt = merged(self.update, self.weight)
            self._w0 = self.weight.clone()
            self.weight.copy_(wt)

    def unmerge(self) -> None:
        """Put W0 back, bit by bit."""
        assert self._w0 is not None
        with torch.no_grad():
            self.weight.copy_(self._w0)
        self._w0 = None


def is_conv1d(layer: nn.Module) -> bool:
    """Tell whether a layer is GPT-2's Conv1D, whose weight is stored as (in, out)."""
    kind = type(layer)  # by its name, for importing transformers takes seconds
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
