"""Put adapters into a model's weights, in place, and take them out again."""

from __future__ import annotations

from torch import nn

from wda.adapters.layer import AdaptedLayer
from wda.errors import ModelError, listing


def merge(model: nn.Module) -> int:
    """Put Wt in the place of W0 in every adapted layer, so that the model is as fast as its base.

    Wt is computed in float64 and rounded once to W0's dtype. W0 is kept beside it until
    :func:`unmerge`: one more copy of the adapted weights, which the model's state dict leaves out.

    Parameters
    ----------
    model : nn.Module
        A model that :func:`wda.adapters.inject` changed.

    Returns
    -------
    int
        How many layers were merged.

    Raises
    ------
    ModelError
        When there are no adapters, they are merged already, or their weights are packed; then
        nothing was changed.

    Examples
    --------
    >>> from torch import nn
    >>> from wda.adapters import AdapterConfig, inject
    >>> model = nn.ModuleDict({"q_proj": nn.Linear(4, 6)})
    >>> inject(model, AdapterConfig(method="dora", rank=2, targets=["query"]))
    1
    >>> merge(model), unmerge(model)
    (1, 1)
    """
    layers = _adapted(model)
    if done := [name for name, layer in layers.items() if layer.is_merged]:
        raise ModelError(
            f"model: the adapters of {listing(done, 3)} are merged already; merging twice would "
            "count them twice; wda.adapters.unmerge(model) takes them out"
        )
    if packed := [name for name, layer in layers.items() if layer.frozen.packed]:
        raise ModelError(
            f"model: the weights of {listing(packed, 3)} are packed, and what the adapter changed "
            "would be lost in rounding Wt to so few levels; `wda merge ADAPTER --base BASE --out "
            "DIR` writes the merged model unpacked"
        )
    for layer in layers.values():
        layer.merge()
    return len(layers)


def unmerge(model: nn.Module) -> int:
    """Put W0 back, with the bits it had, into every adapted layer.

    Parameters
    ----------
    model : nn.Module
        A model that :func:`merge` changed.

    Returns
    -------
    int
        How many layers were unmerged.

    Raises
    ------
    ModelError
        When there are no adapters, or they are not merged; then nothing was changed.
    """
    layers = _adapted(model)
    if apart := [name for name, layer in layers.items() if not layer.is_merged]:
        raise ModelError(
            f"model: the adapters of {listing(apart, 3)} are not merged, so there is nothing to "
            "take out; wda.adapters.merge(model) puts them in"
        )
    for layer in layers.values():
        layer.unmerge()
    return len(layers)


def require_apart(model: nn.Module, why: str) -> None:
    """Refuse what needs W0 in its place.

    Raises
    ------
    ModelError
        When adapters are merged.
    """
    if merged := [name for name, layer in adapted_layers(model).items() if layer.is_merged]:
        raise ModelError(
            f"model: the adapters of {listing(merged, 3)} are merged, and {why}; call "
            "wda.adapters.unmerge(model) first"
        )


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Give the adapted layers of a model by the names of their modules."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def _adapted(model: nn.Module) -> dict[str, AdaptedLayer]:
    layers = adapted_layers(model)
    if not layers:
        raise ModelError(
            "model: has no adapters; put them in with wda.adapters.inject(model, config)"
        )
    return layers
