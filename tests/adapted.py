"""Single layers with an adapter, for the tests."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from wda.adapters import AdaptedLayer, Adapter, AdapterConfig, inject


def tiny_llama(kind: Any = transformers.LlamaForCausalLM, seed: int = 0, **changes: Any) -> Any:
    """A LLaMA of two layers, of whose projections those of key and value are not square."""
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "vocab_size": 50,
        "num_labels": 3,
        "pad_token_id": 0,
        **changes,
    }
    return kind(transformers.LlamaConfig(**shape))


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
