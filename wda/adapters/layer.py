"""A layer with adapters: frozen, with one or several updates beside it that can be merged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wda.adapters.adapter import Adapter
from wda.adapters.config import AdapterConfig
from wda.adapters.dora import Decomposed, start_magnitude
from wda.adapters.frozen import Frozen
from wda.adapters.lora import Added
from wda.errors import ModelError
from wda.updates import Update, merged


class AdaptedLayer(nn.Module):
    """A frozen layer whose weight adapters update.

    Merged, the frozen layer holds Wt and W0 waits beside it, so that unmerging restores W0's bits;
    that is one more copy of the weight for as long as it lasts, and it is not saved with the model.

    Parameters
    ----------
    frozen : Frozen
        The layer to wrap; its parameters are frozen.
    """

    def __init__(self, frozen: Frozen) -> None:
        super().__init__()
        self.frozen = frozen
        self.base_layer: nn.Module = frozen.layer.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.configs: dict[str, AdapterConfig] = {}
        self.active: tuple[str, ...] = ()
        self.joined: Added | Decomposed = Added([])
        self._w0: Tensor | None = None
        self.training = self.base_layer.training

    @property
    def weight(self) -> Float[Tensor, "out features"]:
        """The frozen layer's weight as (out_features, features): W0, or Wt while merged."""
        return self.frozen.weight

    @property
    def is_merged(self) -> bool:
        """Whether the frozen layer holds Wt."""
        return self._w0 is not None

    @property
    def update(self) -> Update | None:
        """What turns W0 into Wt; None while no adapter of this layer is active."""
        return self.joined.update(self.frozen)

    def add(self, name: str, adapter: Adapter, config: AdapterConfig) -> None:
        """Put an adapter into the layer, and activate it alone."""
        if config.decomposed:
            adapter.magnitude = nn.Parameter(start_magnitude(self.frozen, config.per))
        self.adapters[name] = adapter.train(self.training)
        self.configs[name] = config
        self.activate([name])

    def activate(self, names: Iterable[str]) -> None:
        """Let some of the adapters take part, those of them that this layer has.

        They have to decompose alike; :func:`wda.adapters.activate` makes sure of it.
        """
        self.active = tuple(name for name in names if name in self.configs)
        adapters = [cast(Adapter, self.adapters[name]) for name in self.active]
        configs = [self.configs[name] for name in self.active]
        if configs and configs[0].decomposed:
            self.joined = Decomposed(adapters, configs[0].full_gradient, configs[0].per)
        else:
            self.joined = Added(adapters)

    def train(self, mode: bool = True) -> AdaptedLayer:
        """Set the mode; what was kept in the other one is dropped."""
        self.joined.forget()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Apply Wt, and the bias.

        Raises
        ------
        ModelError
            When it is to be trained while it is merged.
        """
        if not self.is_merged:
            return self.joined(self.frozen, x)
        if self.training and torch.is_grad_enabled():
            raise ModelError(
                "model: its adapters are merged and cannot be trained so; call "
                "wda.adapters.unmerge(model) first"
            )
        return self.frozen(x)

    def merge(self) -> None:
        """Put Wt, computed in float64, into the frozen layer."""
        with torch.no_grad():
            self._w0 = self.frozen.layer.weight.clone()
            if self.update is not None:
                wt = merged(self.update, self.weight)
                self.frozen.layer.weight.copy_(self.frozen.as_stored(wt))

    def unmerge(self) -> None:
        """Put W0 back, bit by bit."""
        assert self._w0 is not None
        with torch.no_grad():
            self.frozen.layer.weight.copy_(self._w0)
        self._w0 = None
