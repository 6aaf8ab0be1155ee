"""LoRA, DoRA and relatives as modules: made, put into a model by name, saved in PEFT's layout."""

from wda.adapters.config import AdapterConfig
from wda.adapters.dora import DoRALinear
from wda.adapters.inject import inject
from wda.adapters.lora import LoRALinear
from wda.adapters.magnitude import MagnitudeLinear
from wda.adapters.peft_format import load_adapter, save_adapter

__all__ = [
    "AdapterConfig",
    "DoRALinear",
    "LoRALinear",
    "MagnitudeLinear",
    "inject",
    "load_adapter",
    "save_adapter",
]
