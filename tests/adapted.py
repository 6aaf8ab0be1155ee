"""Single layers with an adapter, for the tests."""

from __future__ import annotations

from typing import Any

from torch import nn

from wda.adapters import AdaptedLayer, Adapter, AdapterConfig, inject


def adapt(layer: nn.Module, method: str, **settings: Any) -> AdaptedLayer:
    """Put an adapter into one layer."""
    model = nn.ModuleDict({"q_proj": layer})
    inject(model, AdapterConfig(method=method, targets=["q_proj"], **settings))
    adapted = model["q_proj"]
    assert isinstance(adapted, AdaptedLayer)
    return adapted


def only(layer: AdaptedLayer) -> Adapter:
    """Give its adapter."""
    (adapter,) = layer.adapters.values()
    assert isinstance(adapter, Adapter)
    return adapter
