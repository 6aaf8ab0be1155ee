"""Single layers with an adapter, for the tests."""

from __future__ import annotations

from typing import Any

import torch
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


def perturb(module: nn.Module, size: float = 0.2) -> None:
    """Move what is trained away from where it starts, by this share of its size."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                typical = parameter.abs().mean().clamp(min=0.1)
                parameter.add_(size * typical * torch.randn_like(parameter))
