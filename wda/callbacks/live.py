"""The weights of a model in training, each as an update: whole weights, LoRA and DoRA."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from wda.adapters import AdaptedLayer
from wda.adapters.bottleneck import bottlenecks
from wda.adapters.weight_norm import normalised
from wda.checkpoints.factors import PREFIX
from wda.checkpoints.state_dicts import plain_name
from wda.errors import ModelError, listing
from wda.naming import Matrix, pick
from wda.updates import Dense, LowRank, Update, WeightDecomposed

_INSTEAD = "save checkpoints and compare those instead"

# How peft may begin without changing the weight that it freezes.
_BEGINS_AT_W0 = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Weight:
    """One weight of a model in training.

    Attributes
    ----------
    stored : Tensor
        The module's own weight: W0 where an adapter is trained beside it, else Wt.
    transposed : bool
        Whether it is (in_features, out_features).
    direction : LowRank or None
        What an adapter adds to it.
    magnitude : Tensor or None
        The magnitudes that DoRA trains.
    shared : bool
        Whether the direction's factors are VeRA's, random and shared.
    """

    stored: Tensor
    transposed: bool
    direction: LowRank | None = None
    magnitude: Tensor | None = None
    shared: bool = False

    @property
    def method(self) -> str:
        """How it is trained: ft, lora, dora, vera or dvora."""
        if self.direction is None:
            return "ft"
        if self.magnitude is None:
            return "vera" if self.shared else "lora"
        return "dvora" if self.shared else "dora"

    @property
    def rank(self) -> int | None:
        """Rank of the adapter."""
        return None if self.direction is None else len(self.direction.A)

    def taken(self, matrix: Matrix) -> Tensor:
        """Give the module's weight as (out_features, in_features), or a part of it."""
        return matrix.take(_on_cpu(self.stored).flatten(1))

    def update(self, matrix: Matrix) -> Update:
        """Give the update of a matrix as it is now."""
        if self.direction is None:
            return Dense(self.taken(matrix))
        rows = matrix.rows_of_stored()
        A, B = _on_cpu(self.direction.A), pick(_on_cpu(self.direction.B), rows)
        direction = LowRank(A, B, self.direction.scaling)
        if self.magnitude is None:
            return direction
        return WeightDecomposed(direction, pick(_on_cpu(self.magnitude).flatten(), rows))


def find_weights(model: nn.Module) -> dict[str, Weight]:
    """Find the weights that are trained, by the names of their modules in the model itself.

    Parameters
    ----------
    model : nn.Module
        A model, which torch.compile, DataParallel or peft may have wrapped.

    Returns
    -------
    dict of str to Weight
        Those with an adapter, if there are any; else all.

    Raises
    ------
    ModelError
        When a weight is trained in a way that is not read here: quantised, split over processes,
        or by an adapter other than LoRA, DoRA, VeRA and DVoRA.
    """
    if other := [*bottlenecks(model), *normalised(model)]:
        raise ModelError(
            f"model: {listing(other, 4)} have bottlenecks, which change no weight, or are "
            f"normalised, and neither is measured while it trains; {_INSTEAD}"
        )
    adapted = dict(_adapted(model))
    return adapted or dict(_whole(model))


def _whole(model: nn.Module) -> Iterator[tuple[str, Weight]]:
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            yield _plain(name), _weight(name, module)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Weight]]:
    tuners, lora = _peft_layers()
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            if found := _of_ours(name, module):
                yield _plain(name), found
        elif isinstance(module, lora):
            if found := _of_peft(model, name, module):
                yield _plain(name), found
        elif isinstance(module, tuners):
            raise ModelError(
                f"{name}: is a {type(module).__name__} of peft, of which only LoRA and DoRA are "
                f"measured while they train; {_INSTEAD}"
            )


def _of_ours(name: str, layer: AdaptedLayer) -> Weight | None:
    """Give the weight of a layer of ours; None where none of its adapters takes part."""
    if layer.is_merged:
        raise ModelError(f"{name}: its adapter is merged; it is measured while it is apart")
    update = layer.update
    if update is None:
        return None
    shared = any(layer.configs[active].shares_projections for active in layer.active)
    if isinstance(update, LowRank):
        return _weight(name, layer.base_layer, update, shared=shared)
    if isinstance(update, WeightDecomposed) and isinstance(update.direction, LowRank):
        return _weight(name, layer.base_layer, update.direction, update.magnitude, shared)
    raise ModelError(f"{name}: has magnitudes of input features; {_INSTEAD}")


def _peft_layers() -> tuple[tuple[type, ...], tuple[type, ...]]:
    """Give peft's class of adapted layers, and of those with LoRA, where peft is in use."""
    if "peft" not in sys.modules:
        return (), ()
    from peft.tuners.lora import LoraLayer  # noqa: PLC0415 - peft need not be there
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415

    return (BaseTunerLayer,), (LoraLayer,)


def _of_peft(model: nn.Module, name: str, layer: Any) -> Weight | None:
    """Give the weight of a layer that peft adapts; None where it has no factors A and B."""
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if not active or not isinstance(getattr(layer.get_base_layer(), "weight", None), Tensor):
        return None
    if len(active) > 1 or layer.merged:
        state = "are merged" if layer.merged else f"{len(active)} at a time"
        raise ModelError(f"{name}: its adapters {state}; one is measured, while it is apart")
    variant = layer.lora_variant.get(active[0])
    if variant is not None and not type(variant).__name__.startswith("Dora"):
        raise ModelError(
            f"{name}: is trained by {type(variant).__name__} of peft, which is neither plain LoRA "
            f"nor DoRA; {_INSTEAD}"
        )
    start = _start(model, active[0])
    if start not in _BEGINS_AT_W0:
        raise ModelError(
            f"{name}: its adapter was started by {start!r}, which changes the frozen weight, so "
            f"that the model does not hold W0; {_INSTEAD}"
        )
    A, B = layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight
    direction = LowRank(A.flatten(1), B.flatten(1), layer.scaling[active[0]])
    magnitudes = layer.lora_magnitude_vector
    magnitude = magnitudes[active[0]].weight if active[0] in magnitudes else None
    return _weight(name, layer.get_base_layer(), direction, magnitude)


def _start(model: nn.Module, adapter: str) -> object:
    """Tell how peft was asked to start an adapter."""
    configs = (getattr(module, "peft_config", {}) for module in model.modules())
    return next((c[adapter].init_lora_weights for c in configs if adapter in c), True)


def _weight(
    name: str,
    module: nn.Module,
    direction: LowRank | None = None,
    magnitude: Tensor | None = None,
    shared: bool = False,
) -> Weight:
    """Give the weight of a module, after making sure that it is all there, in numbers."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    split = isinstance(weight, DTensor) or hasattr(weight, "ds_id")
    if split or (isinstance(module, nn.Linear) and weight.ndim != 2):
        raise ModelError(
            f"{name}: its weight is split over processes (FSDP, ZeRO-3), and no process can "
            f"measure all of it; {_INSTEAD}"
        )
    if not weight.is_floating_point():
        raise ModelError(f"{name}: its weight is quantised ({type(weight).__name__}); {_INSTEAD}")
    return Weight(weight, isinstance(module, Conv1D), direction, magnitude, shared)


def _plain(name: str) -> str:
    return plain_name(name).removeprefix(PREFIX)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()
