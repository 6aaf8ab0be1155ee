"""A recipe → its model without weights, from the configuration alone: nothing is downloaded."""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from wda.adapters import inject, with_prefix
from wda.adapters.packed import hush_bitsandbytes
from wda.errors import LocationError, ManifestError, MissingExtraError
from wda.locations import locate
from wda.training.recipe import Recipe
from wda.training.tasks import task_of
from wda.training.trained_whole import modules_called


@dataclass(frozen=True)
class Count:
    """How many numbers a recipe trains.

    Attributes
    ----------
    trainable : int
        Trained parameters.
    parameters : int
        All of them, base and added, as PEFT counts. Packed ones count as what they stand for.
    """

    trainable: int
    parameters: int

    @property
    def share(self) -> float:
        """Trained over all, 0 to 1."""
        return self.trainable / self.parameters


def blueprint(recipe: Recipe) -> Any:
    """Build a recipe's model, adapter and all, on the meta device: shapes without numbers.

    Parameters
    ----------
    recipe : Recipe
        Of a classification, the head has as many classes as the configuration says.

    Returns
    -------
    nn.Module
        Whose parameters need gradients where they are trained.

    Raises
    ------
    WdaError
        When the configuration cannot be read, or the adapter does not fit the model.

    Notes
    -----
    Which modules of a classifier are new cannot be known without its weights: all beside its body
    are taken to be.
    """
    model = _unet(recipe.base) if recipe.task == "text-to-image" else _empty(recipe)
    if recipe.adapter is None:
        return model
    whole = modules_called(model, recipe.trained_whole)
    if recipe.task == "classification":
        whole += tuple(n for n, _ in model.named_children() if n != model.base_model_prefix)
    if recipe.method == "prefix":
        return with_prefix(model, recipe.adapter, task_of(recipe).peft_type, whole)
    with torch.device("meta"):
        inject(model, recipe.adapter, trained_whole=whole)
    return model


def count(model: nn.Module) -> Count:
    """Count a model's trained parameters and all of them, a shared one once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Count(sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes))


def model_config(location: str) -> Any:
    """Read the configuration of a model.

    Those of the paper's models come with wda, for some of them are behind a licence on the Hub.

    Parameters
    ----------
    location : str
        Of the model: a folder, a GGUF file, or a repository.

    Returns
    -------
    transformers.PretrainedConfig
        Its shapes.

    Raises
    ------
    LocationError
        When there is no ``config.json``, or it is none of a model that transformers knows.
    """
    place = _shipped(location) or locate(location)
    try:
        if place.suffix == ".gguf":
            folder, name = Path(str(place)).parent, place.name
            return transformers.AutoConfig.from_pretrained(folder, gguf_file=name)
        file = place if place.suffix == ".json" else place / "config.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        return transformers.AutoConfig.for_model(content.pop("model_type"), **content)
    except (OSError, ValueError, KeyError) as error:
        why = (str(error).strip().splitlines() or ["nothing is said"])[0]
        raise LocationError(
            f"base: {location}: has no config.json of a model that transformers knows ({why}); "
            "give a folder in Hugging Face's layout or a GGUF file"
        ) from None


def _shipped(location: str) -> Path | None:
    if not location.startswith("hf://"):
        return None
    name = location.removeprefix("hf://").partition("@")[0].replace("/", "--")
    file = Path(str(importlib.resources.files("wda"))) / "recipes/architectures" / f"{name}.json"
    return file if file.is_file() else None


def _empty(recipe: Recipe) -> Any:
    config = model_config(recipe.base)
    with torch.device("meta"):
        if recipe.task == "image-text":
            return getattr(transformers, config.architectures[0])(config)
        try:
            return task_of(recipe).kind.from_config(config)
        except ValueError as error:
            raise ManifestError(
                f"task: {recipe.task}: {recipe.base} is a {config.model_type}, of which "
                f"transformers has no such model ({str(error).splitlines()[0][:120]}); choose "
                "another task or base"
            ) from None


def _unet(location: str) -> Any:
    """Build the part of a diffusion model that adapters go into."""
    hush_bitsandbytes()
    try:
        import diffusers  # noqa: PLC0415 - an extra
    except ImportError:
        raise MissingExtraError(
            "task: text-to-image needs diffusers, which is not installed; "
            "try: pip install diffusers"
        ) from None
    file = _shipped(location) or locate(location) / "unet" / "config.json"
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel.from_config(json.loads(file.read_text("utf-8")))
