"""Put adapters into a model, by the names of its modules."""

from __future__ import annotations

from torch import nn

from wda.adapters.config import AdapterConfig
from wda.adapters.dora import DoRALinear
from wda.adapters.layer import AdaptedLayer
from wda.adapters.lora import LoRALinear
from wda.adapters.magnitude import MagnitudeLinear
from wda.adapters.places import check_rank, choose


def inject(model: nn.Module, config: AdapterConfig, trained_whole: tuple[str, ...] = ()) -> int:
    """Replace a model's chosen linear layers by adapted ones, in place, and freeze the rest.

    Parameters
    ----------
    model : nn.Module
        The pre-trained model.
    config : AdapterConfig
        Which adapter, how large, and where.
    trained_whole : tuple of str
        Names of modules that stay trainable as they are, such as a new classifier.

    Returns
    -------
    int
        How many layers were replaced.

    Raises
    ------
    SelectionError
        When a target names no module, or one that is neither an ``nn.Linear`` nor a ``Conv1D``,
        shares its weight with another, or is too small for the rank. The model is as it was.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.ModuleDict({"q_proj": nn.Linear(4, 6), "o_proj": nn.Linear(6, 4)})
    >>> inject(model, AdapterConfig(method="dora", rank=2, targets=["query"]))
    1
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['q_proj.A', 'q_proj.B', 'q_proj.magnitude']
    """
    directions = choose(model, config.targets)
    magnitudes = choose(model, config.magnitudes, "magnitudes") if config.magnitudes else []
    if config.method != "magnitude":
        check_rank(model, directions, config.rank)
    modules = sorted({*directions, *magnitudes})
    model.requires_grad_(False)
    for name in modules:
        parent, _, last = name.rpartition(".")
        layer = _adapted(model.get_submodule(name), config, name in directions)
        setattr(model.get_submodule(parent), last, layer)
    for name in trained_whole:
        model.get_submodule(name).requires_grad_(True)
    return len(modules)


def _adapted(layer: nn.Module, config: AdapterConfig, direction: bool) -> AdaptedLayer:
    if config.method == "magnitude" or not direction:
        return MagnitudeLinear(layer)
    if config.method == "dora":
        return DoRALinear(layer, config.rank, config.scaling, config.full_gradient)
    return LoRALinear(layer, config.rank, config.scaling)
