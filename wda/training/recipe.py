"""The recipe of a training: a typed model, read from YAML and saved beside what it produced."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from wda.adapters import AdapterConfig
from wda.errors import ManifestError
from wda.locations import beside
from wda.validation import load_yaml


class DataSource(BaseModel):
    """Labelled texts in a CSV file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    location: str = Field(description="Location of the CSV file.")
    text: str = Field(default="text", description="Column with the text.")
    label: str = Field(default="label", description="Column with the class, any text or number.")
    where: dict[str, str] = Field(
        default={}, description="Column → value that a row must have to be used."
    )
    held_out: float = Field(
        default=0.1, gt=0, lt=1, description="Share of the rows kept for the held-out accuracy."
    )
    split_seed: int = Field(default=0, description="Seed of that split; the runs share it.")


class Recipe(BaseModel):
    """A fine-tuning of a text classifier, from the pre-trained model to the last checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = Field(description="Location of the pre-trained model, in Hugging Face's layout.")
    data: DataSource = Field(description="What it is trained on.")
    adapter: AdapterConfig | None = Field(
        default=None, description="The adapter; without one, all weights are trained."
    )
    steps: int = Field(gt=0, description="Optimiser steps.")
    keep: list[Annotated[int, Field(gt=0)]] = Field(
        default=[], description="Steps whose checkpoints are kept, beside the last."
    )
    learning_rate: float = Field(gt=0, description="Peak learning rate of AdamW.")
    batch_size: int = Field(default=16, gt=0, description="Texts per device and forward pass.")
    accumulation: int = Field(default=1, gt=0, description="Forward passes per optimiser step.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="How the learning rate falls after the warm-up."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up.")
    group_by_length: bool = Field(
        default=False, description="Batches of texts of like length: less padding, so faster."
    )
    max_length: int = Field(default=128, gt=0, description="Tokens a text is cut to.")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Of forward and backward pass; weights stay float32."
    )
    seed: int = Field(default=0, ge=0, description="Of initialisation, order and dropout.")

    @model_validator(mode="after")
    def _kept_steps_exist(self) -> Self:
        late = [step for step in self.keep if step > self.steps]
        if late:
            raise ValueError(f"keep: steps {late} lie after the last, steps: {self.steps}")
        return self

    @property
    def method(self) -> str:
        """``ft``, or the adapter's method."""
        return "ft" if self.adapter is None else self.adapter.method

    @property
    def kept_steps(self) -> list[int]:
        """Every step whose checkpoint is kept, the last among them."""
        return sorted({*self.keep, self.steps})

    def with_steps(self, steps: int) -> Recipe:
        """Give the recipe for another length, its kept steps at the same shares of it."""
        keep = sorted({max(1, round(kept * steps / self.steps)) for kept in self.keep})
        return self.model_copy(update={"steps": steps, "keep": keep})

    def to_yaml(self) -> str:
        """Give the recipe as the text of a YAML file."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def load_recipe(path: Path) -> Recipe:
    """Read and validate a recipe; relative paths in it start from its folder.

    Raises
    ------
    ManifestError
        With every problem in it, each with its line.
    """
    recipe = load_yaml(path, Recipe, ManifestError)
    data = recipe.data.model_copy(update={"location": beside(path, recipe.data.location)})
    return recipe.model_copy(update={"base": beside(path, recipe.base), "data": data})
