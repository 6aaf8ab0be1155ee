"""Put adapters into a model, by the names of its modules, and choose which take part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn

from wda.adapters.adapter import Adapter
from wda.adapters.bottleneck import BottleneckLayer, bottlenecks
from wda.adapters.config import AdapterConfig
from wda.adapters.frozen import Frozen, FrozenConv1D, FrozenLinear
from wda.adapters.layer import AdaptedLayer
from wda.adapters.lora import LoRA
from wda.adapters.magnitude import MagnitudeOnly
from wda.adapters.merge import adapted_layers, require_apart
from wda.adapters.places import check_rank, choose, frozen_layer
from wda.adapters.vera import Projections, VeRA
from wda.adapters.weight_norm import normalise, normalised
from wda.errors import ModelError, SelectionError, listing


def inject(
    model: nn.Module,
    config: AdapterConfig,
    trained_whole: tuple[str, ...] = (),
    name: str = "default",
) -> int:
    """Put an adapter into a model's chosen layers, in place, and freeze the rest.

    A model may carry several; the new one alone takes part until :func:`activate` says otherwise.

    Parameters
    ----------
    model : nn.Module
        The pre-trained model.
    config : AdapterConfig
        Which adapter, how large, and where.
    trained_whole : tuple of str
        Names of modules that stay trainable as they are, such as a new classifier.
    name : str
        What this adapter is called.

    Returns
    -------
    int
        How many layers it went into.

    Raises
    ------
    SelectionError
        When a target names no module, or one that no adapter can go into, shares its weight with
        another, or is too small for the rank. The model is as it was.
    ModelError
        When the model has an adapter of this name, or merged ones, or the method is ``prefix``.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.ModuleDict({"q_proj": nn.Linear(4, 6), "o_proj": nn.Linear(6, 4)})
    >>> inject(model, AdapterConfig(method="dora", rank=2, targets=["query"]))
    1
    >>> for parameter, values in model.named_parameters():
    ...     if values.requires_grad:
    ...         print(parameter)
    q_proj.adapters.default.magnitude
    q_proj.adapters.default.A
    q_proj.adapters.default.B
    """
    if config.method == "prefix":
        raise ModelError(
            "method: prefix puts a model into another and changes none of its layers; use "
            "wda.adapters.with_prefix(model, config, task_type)"
        )
    require_apart(model, "another cannot be put beside them")
    if other := [*bottlenecks(model), *normalised(model)]:
        raise ModelError(
            f"model: {listing(other, 4)} are bottlenecks or normalised already; inject into the "
            "model as it was"
        )
    if any(name in layer.configs for layer in adapted_layers(model).values()):
        raise ModelError(f"name: the model has an adapter called {name!r}; choose another name")
    turned = choose(model, config.targets)
    scaled = choose(model, config.magnitudes, "magnitudes") if config.magnitudes else []
    _check(model, config, turned, scaled)
    model.requires_grad_(False)
    if config.method == "weightnorm":
        for module in turned:
            normalise(cast(nn.Linear, model.get_submodule(module)))
    elif not config.changes_weights:
        _put_bottlenecks(model, config, turned)
    else:
        _put_adapters(model, config, turned, scaled, name)
    for module in trained_whole:
        model.get_submodule(module).requires_grad_(True)
    return len({*turned, *scaled})


def activate(model: nn.Module, *names: str) -> None:
    """Choose which of a model's adapters take part.

    Several add up: V = W0 + Σ s·B·A, and m = ‖W0‖ + Σ (m_i − ‖W0‖) where they have magnitudes, so
    their order does not matter and merged they do the same. What is trained stays as it is.

    Parameters
    ----------
    model : nn.Module
        A model that :func:`inject` changed.
    *names : str
        The adapters; none for the model as it was.

    Raises
    ------
    ModelError
        When there is no such adapter, some layer's would decompose in different ways, or they are
        merged; then nothing was changed.
    """
    require_apart(model, "others cannot take their place")
    layers = adapted_layers(model)
    known = {name for layer in layers.values() for name in layer.configs}
    if absent := sorted(set(names) - known):
        raise ModelError(
            f"names: the model has no adapter called {listing(absent)}; it has "
            f"{listing(sorted(known)) or 'none'}"
        )
    for module, layer in layers.items():
        configs = [layer.configs[name] for name in names if name in layer.configs]
        if len({(c.decomposed, c.full_gradient, c.per) for c in configs}) > 1:
            raise ModelError(
                f"names: {listing(names)} meet in {module} and change the weight in different "
                "ways (with magnitudes or without, full_gradient, per), so they do not add up; "
                "activate one of them, or merge one and inject the other anew"
            )
    for layer in layers.values():
        layer.activate(names)


def _put_adapters(
    model: nn.Module,
    config: AdapterConfig,
    turned: Sequence[str],
    scaled: Sequence[str],
    name: str,
) -> None:
    layers = {module: _layer(model, module) for module in sorted({*turned, *scaled})}
    shared = _projections(config, [layers[module].frozen for module in turned])
    for module, layer in layers.items():
        with_direction = config.method != "magnitude" and module in turned
        layer.add(name, _adapter(layer.frozen, config, with_direction, shared), config)
    activate(model, name)


def _check(
    model: nn.Module, config: AdapterConfig, turned: Sequence[str], scaled: Sequence[str]
) -> None:
    # VeRA's r may be larger than its matrices.
    if config.method in ("lora", "rslora", "dora"):
        check_rank(model, turned, config.rank)
    for_linear = config.method in ("weightnorm", "series", "parallel")
    if config.per == "input" or for_linear:
        kinds = {module: type(frozen_layer(model, module)) for module in {*turned, *scaled}}
        what = config.method if for_linear else "per: input"
        # A V in the place of W0 would be stored as W0 is, transposed in a Conv1D.
        linear = {FrozenLinear} if what == "weightnorm" else {FrozenLinear, FrozenConv1D}
        if others := sorted(m for m, kind in kinds.items() if kind not in linear):
            raise SelectionError(
                f"targets: {what} is for linear layers; {listing(others, 4)} are not; choose "
                "other targets"
            )


def _layer(model: nn.Module, module: str) -> AdaptedLayer:
    """Give the adapted layer of that name, made of the layer there if it is not one yet."""
    there = model.get_submodule(module)
    if isinstance(there, AdaptedLayer):
        return there
    layer = AdaptedLayer(frozen_layer(model, module))
    _replace(model, module, layer)
    return layer


def _put_bottlenecks(model: nn.Module, config: AdapterConfig, modules: Sequence[str]) -> None:
    for module in modules:
        frozen, series = frozen_layer(model, module), config.method == "series"
        _replace(model, module, BottleneckLayer(frozen, config.bottleneck, series))


def _replace(model: nn.Module, module: str, layer: nn.Module) -> None:
    parent, _, last = module.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _projections(config: AdapterConfig, layers: Sequence[Frozen]) -> Projections | None:
    return Projections(layers, config.rank) if config.shares_projections else None


def _adapter(
    frozen: Frozen, config: AdapterConfig, with_direction: bool, shared: Projections | None
) -> Adapter:
    if not with_direction:
        return MagnitudeOnly(frozen)
    if shared is not None:
        return VeRA(frozen, shared, config.dropout)
    return LoRA(frozen, config.rank, config.scaling, config.dropout)
