"""LoRA, DoRA and relatives as modules: put into a model by name, merged, saved in PEFT's layout."""

from wda.adapters.config import AdapterConfig
from wda.adapters.dora import DoRALinear
from wda.adapters.inject import inject
from wda.adapters.lora import LoRALinear
from wda.adapters.magnitude import MagnitudeLinear
from wda.adapters.merge import merge, unmerge
from wda.adapters.peft_format import load_adapter, save_adapter

__all__ = [
    "AdapterConfig",
    "DoRALinear",
    "LoRALinear",
    "MagnitudeLinear",
    "inject",
    "load_adapter",
    "merge",
    "save_adapter",
    "unmerge",
]
