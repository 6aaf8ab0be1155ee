"""What training frameworks wrap around a model's tensors: dictionaries, and prefixes of names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from wda.errors import CheckpointError, listing

Value = TypeVar("Value")

# Where a training checkpoint keeps the model's tensors, beside those of the optimiser: Lightning's
# name, the usual hand-written ones, DeepSpeed's; PyTorch's guides put all of it into "app".
_KEYS = ("state_dict", "model_state_dict", "model", "module", "app")

# What torch.compile, FSDP, activation checkpointing and old Lightning put into names, anywhere.
_WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)


def tensors_within(loaded: object, path: Path) -> dict[str, Tensor]:
    """Find the model's tensors in what a pickle held, by name.

    Raises
    ------
    CheckpointError
        When there are none, at the top or under one of the usual keys.
    """
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path}: holds a {type(loaded).__name__}, expected a dictionary of named tensors"
        )
    found = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    inner = next((loaded[key] for key in _KEYS if isinstance(loaded.get(key), dict)), None)
    if not found and inner is None:
        raise CheckpointError(
            f"{path}: holds no named tensors, neither at its top nor under {', '.join(_KEYS)}; "
            f"its keys are {listing(loaded, 6) or 'none'}"
        )
    return found or tensors_within(inner, path)


def without_wrappers(items: Mapping[str, Value], source: object) -> dict[str, Value]:
    """Give the same under the names that the model itself has.

    Raises
    ------
    CheckpointError
        When two names differ in nothing but wrappers.
    """
    plain = {name: plain_name(name) for name in items}
    if len(set(plain.values())) < len(plain):
        twice = sorted(name for name in plain if list(plain.values()).count(plain[name]) > 1)
        raise CheckpointError(
            f"{source}: holds the same tensor several times, wrapped and not: {listing(twice, 4)}; "
            "save one of them alone"
        )
    return {plain[name]: value for name, value in items.items()}


def plain_name(name: str) -> str:
    """Take away what wrappers put into a tensor's name.

    Examples
    --------
    >>> plain_name("module._orig_mod.encoder.layer.0._fsdp_wrapped_module.query.weight")
    'encoder.layer.0.query.weight'
    >>> plain_name("encoder.module.weight")
    'encoder.module.weight'
    """
    words = [word for word in name.split(".") if word not in _WRAPPERS]
    while words[0] == "module" and len(words) > 1:
        words.pop(0)  # DistributedDataParallel's, which stands in front alone
    return ".".join(words)
