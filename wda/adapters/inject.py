"""Put adapters into a model, by the names of its modules."""

from __future__ import annotations

from torch import nn

from wda.adapters.config import AdapterConfig
from wda.adapters.dora import DoRALinear
from wda.adapters.layer import AdaptedLayer, is_conv1d
from wda.adapters.lora import LoRALinear
from wda.adapters.magnitude import MagnitudeLinear
from wda.errors import SelectionError, listing
from wda.naming import find_matrices, select


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
        When a target names no module, or one that is neither an ``nn.Linear`` nor a ``Conv1D``.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.ModuleDict({"q_proj": nn.Linear(4, 6), "o_proj": nn.Linear(6, 4)})
    >>> inject(model, AdapterConfig(method="dora", rank=2, targets=["query"]))
    1
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['q_proj.A', 'q_proj.B', 'q_proj.magnitude']
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    matrices = find_matrices(shapes)
    directions = {matrix.module for matrix in select(matrices, config.targets)}
    magnitudes = {matrix.module for matrix in select(matrices, config.magnitudes or config.targets)}
    modules = sorted(directions | magnitudes)
    others = [m for m in modules if not _is_linear(model.get_submodule(m))]
    if others:
        kinds = sorted({type(model.get_submodule(m)).__name__ for m in others})
        raise SelectionError(
            f"targets: adapters go into nn.Linear and Conv1D layers; {listing(others, 4)} are "
            f"{listing(kinds)}; choose other targets"
        )
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


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or is_conv1d(layer)
