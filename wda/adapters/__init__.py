"""LoRA, DoRA and relatives as modules: put into a model by name, merged, saved in PEFT's layout."""

from wda.adapters.adapter import Adapter
from wda.adapters.config import AdapterConfig
from wda.adapters.inject import activate, inject
from wda.adapters.layer import AdaptedLayer
from wda.adapters.lora import LoRA
from wda.adapters.magnitude import MagnitudeOnly
from wda.adapters.merge import merge, unmerge
from wda.adapters.peft_format import load_adapter, save_adapter
from wda.adapters.prefix import with_prefix
from wda.adapters.vera import VeRA

__all__ = [
    "AdaptedLayer",
    "Adapter",
    "AdapterConfig",
    "LoRA",
    "MagnitudeOnly",
    "VeRA",
    "activate",
    "inject",
    "load_adapter",
    "merge",
    "save_adapter",
    "unmerge",
    "with_prefix",
]
