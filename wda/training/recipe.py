"""The recipe of a training: a typed model, read from YAML and saved beside what it produced."""

from __future__ import annotations

import math
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from wda._version import __version__
from wda.adapters import AdapterConfig
from wda.errors import ManifestError
from wda.locations import beside
from wda.validation import read_yaml

# Of the format of recipes. A field that is added does not change it; one that changes meaning does.
FORMAT = 1

TaskName = Literal["classification", "causal-lm", "seq2seq", "image-text", "text-to-image"]


def _steps_or_share(amount: float) -> float:
    if isinstance(amount, int) or 0 <= amount < 1:
        return amount
    raise ValueError("Input should be a whole number of steps, or a share of them below 1")


# A number of steps, or a share of all of them. 1.0 is neither: it could mean the first or the last.
Amount = Annotated[int | float, Field(ge=0), AfterValidator(_steps_or_share)]

# Where to start seeking each method's rate: for DoRA from the paper's Table 8 (1e-4 to 3e-4), for
# DVoRA and so VeRA from its Table 11, LoRA's a little above DoRA's; the others are our choice.
LEARNING_RATES = {
    "ft": 2e-5,
    "lora": 2e-4,
    "rslora": 1e-4,
    "dora": 1e-4,
    "magnitude": 1e-3,
    "vera": 4e-3,
    "dvora": 4e-3,
    "weightnorm": 2e-5,
    "series": 3e-4,
    "parallel": 3e-4,
    "prefix": 1e-2,
}


class DataSource(BaseModel):
    """Rows to train on, and which to hold out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    location: str = Field(
        description="Location of a CSV, JSON, JSONL or Parquet file, also https://…, of a folder "
        "with a dataset, or hf://datasets/ORG/NAME@REVISION."
    )
    config: str | None = Field(default=None, description="Which of a dataset's configurations.")
    split: str = Field(default="train", description="Which of a dataset's splits to train on.")
    text: str = Field(default="text", description="Classification: column with the text.")
    label: str = Field(
        default="label", description="Classification: column with the class, any text or number."
    )
    prompt: str = Field(
        default="",
        description="Generation: what is given, a text with columns in braces: "
        "'Question: {question} Answer: '.",
    )
    answer: str = Field(
        default="", description="Generation: what is to be learnt, written like the prompt."
    )
    choices: list[str] = Field(
        default=[],
        description="Generation: words that answers choose among, such as [yes, no]. The held-out "
        "rows are then answered too: by what the model writes first of them, and by likelihood. "
        "Of a row, those count that its prompt names; all, where it names none.",
    )
    where: dict[str, str] = Field(
        default={}, description="Column → value that a row must have to be used."
    )
    samples: int | None = Field(
        default=None, gt=0, description="Rows to train on, of those not held out; by default all."
    )
    held_out: Annotated[float, Field(gt=0, lt=1)] | str = Field(
        default=0.1,
        description="Share of the rows kept for the held-out scores; or another split of the "
        "dataset, or the location of another file.",
    )
    split_seed: int = Field(default=0, description="Seed of that split; the runs share it.")


class Recipe(BaseModel):
    """A fine-tuning, from the pre-trained model to the last checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = Field(
        description="Location of the pre-trained model: a folder in Hugging Face's layout, or a "
        "GGUF file."
    )
    task: TaskName = Field(
        default="classification",
        description="`causal-lm` continues prompts with answers, `seq2seq` writes answers from "
        "encoded prompts; only answers count in the loss. Models of `image-text` and "
        "`text-to-image` are counted by `wda params` and not trained.",
    )
    data: DataSource = Field(description="What it is trained on.")
    adapter: AdapterConfig | None = Field(
        default=None, description="The adapter; without one, all weights are trained."
    )
    trained_whole: list[str] = Field(
        default=[],
        description="Modules that are trained as they are beside an adapter, by their path or the "
        "last names of it.",
    )
    quantised: Literal["nf4", "int8"] | None = Field(
        default=None,
        description="Pack the frozen base by bitsandbytes before an adapter is trained on it: "
        "QLoRA, QDoRA. The packed base is kept in the run's folder.",
    )
    steps: int | None = Field(default=None, gt=0, description="Optimiser steps; or give `epochs`.")
    epochs: float | None = Field(
        default=None, gt=0, description="Passes over the data; or give `steps`."
    )
    keep: list[Annotated[Amount, Field(gt=0)]] = Field(
        default=[],
        description="When checkpoints are kept, beside the last: steps, or shares of all steps.",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Peak learning rate of AdamW; by default the method's, see docs/training.md.",
    )
    batch_size: int = Field(default=16, gt=0, description="Texts per device and forward pass.")
    accumulation: int = Field(default=1, gt=0, description="Forward passes per optimiser step.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="How the learning rate falls after the warm-up."
    )
    warmup: Amount = Field(default=0, description="Linear warm-up: steps, or a share of all steps.")
    group_by_length: bool = Field(
        default=False, description="Batches of texts of like length: less padding, so faster."
    )
    max_length: int = Field(default=128, gt=0, description="Tokens a text is cut to.")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Of forward and backward pass; weights stay float32."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Less memory: activations are computed again, not kept."
    )
    seed: int = Field(default=0, ge=0, description="Of initialisation, order and dropout.")
    version: int = Field(
        default=FORMAT,
        ge=1,
        description="Of the recipe's format; a later one needs a later wda.",
    )

    @field_validator("version")
    @classmethod
    def _is_known(cls, version: int) -> int:
        if version > FORMAT:
            raise ValueError(
                f"this wda ({__version__}) reads recipes up to version {FORMAT}; try: "
                "pip install --upgrade weight-decomposition-analysis"
            )
        return version

    @model_validator(mode="after")
    def _whole_beside_an_adapter(self) -> Self:
        if self.trained_whole and self.adapter is None:
            raise ValueError("trained_whole: without an adapter all modules are trained")
        return self

    @model_validator(mode="after")
    def _length_is_given_once(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("steps, epochs: give one of the two, and not both")
        if self.steps is not None and (late := self._kept_after(self.steps)):
            raise ValueError(f"keep: steps {late} lie after the last, steps: {self.steps}")
        return self

    @model_validator(mode="after")
    def _a_packed_base_is_frozen(self) -> Self:
        if self.quantised and self.task == "classification":
            raise ValueError("quantised: is for causal-lm and seq2seq, whose models are whole")
        if self.quantised and (self.adapter is None or self.method == "weightnorm"):
            raise ValueError(
                f"quantised: packed weights cannot be trained, as {self.method} would; add an "
                "adapter such as dora"
            )
        return self

    @model_validator(mode="after")
    def _prefix_is_kept(self) -> Self:
        if self.method == "prefix" and self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing: computes layers again without their prefix; leave it "
                "out, or choose another method"
            )
        return self

    @model_validator(mode="after")
    def _data_fit_the_task(self) -> Self:
        defaults = DataSource.model_fields
        generates = self.task != "classification"
        given = {n for n in ("prompt", "answer", "choices") if getattr(self.data, n)}
        foreign = (
            {n for n in ("text", "label") if getattr(self.data, n) != defaults[n].default}
            if generates
            else given
        )
        if foreign:
            raise ValueError(f"data: {', '.join(sorted(foreign))} cannot be set for {self.task}")
        if self.task in ("image-text", "text-to-image"):
            return self
        if generates and (missing := {"prompt", "answer"} - given):
            raise ValueError(f"data: {self.task} needs {', '.join(sorted(missing))}")
        for name in given - {"choices"}:
            _columns(name, getattr(self.data, name))
        return self

    @property
    def method(self) -> str:
        """``ft``, or the adapter's method."""
        return "ft" if self.adapter is None else self.adapter.method

    @property
    def rate(self) -> float:
        """The peak learning rate, the method's where none is given."""
        return self.learning_rate or LEARNING_RATES[self.method]

    def all_steps(self, n_rows: int, processes: int = 1) -> int:
        """Give the number of optimiser steps for so many rows on so many processes."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        per_epoch = math.ceil(n_rows / (self.batch_size * self.accumulation * processes))
        return max(1, math.ceil(self.epochs * per_epoch))

    def kept_steps(self, all_steps: int) -> list[int]:
        """Give every step whose checkpoint is kept, the last among them.

        Raises
        ------
        ManifestError
            When some lie after the last.
        """
        if late := self._kept_after(all_steps):
            raise ManifestError(
                f"keep: steps {late} lie after the last, {all_steps}, for these data and epochs: "
                f"{self.epochs:g}; name shares of the whole, such as 0.5, or fewer steps"
            )
        return sorted({all_steps, *(_step(moment, all_steps) for moment in self.keep)})

    def _kept_after(self, all_steps: int) -> list[float]:
        return [k for k in self.keep if isinstance(k, int) and k > all_steps]

    def warmup_steps(self, all_steps: int) -> int:
        """Give the steps of the warm-up."""
        return self.warmup if isinstance(self.warmup, int) else math.ceil(self.warmup * all_steps)

    def with_steps(self, steps: int) -> Recipe:
        """Give the recipe for another length, its kept steps at the same shares of it."""
        assert self.steps is not None
        whole = self.steps
        keep = sorted({max(1, round(_step(kept, whole) * steps / whole)) for kept in self.keep})
        return self.model_copy(update={"steps": steps, "keep": keep})

    def to_yaml(self) -> str:
        """Give the recipe as the text of a YAML file."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def columns_of(template: str) -> list[str]:
    """Name the columns of a text with columns in braces."""
    return [field for _, field, _, _ in Formatter().parse(template) if field is not None]


def _columns(name: str, template: str) -> None:
    """Make sure that a template can be filled."""
    try:
        columns = columns_of(template)
    except ValueError as problem:
        raise ValueError(f"data.{name}: {problem}; double a brace that is meant as one") from None
    if not columns or not all(columns):
        raise ValueError(f"data.{name}: needs a column in braces, such as {{question}}")


def _step(moment: float, all_steps: int) -> int:
    return moment if isinstance(moment, int) else max(1, round(moment * all_steps))


def load_recipe(path: Path) -> Recipe:
    """Read and validate a recipe; relative paths in it start from its folder.

    Raises
    ------
    ManifestError
        With every problem in it, each with its line.
    """
    document = read_yaml(path, list(Recipe.model_fields), ManifestError)
    if "grid" in document.content:
        raise ManifestError(f"{path}: has a grid, so it is several recipes; use wda sweep")
    return beside_recipe(path, document.validate(Recipe, ManifestError))


def beside_recipe(path: Path, recipe: Recipe) -> Recipe:
    """Give a recipe whose relative paths start from the folder of a file."""
    data = recipe.data.model_copy(update={"location": beside(path, recipe.data.location)})
    if isinstance(data.held_out, str) and Path(data.held_out).suffix:
        data = data.model_copy(update={"held_out": beside(path, data.held_out)})
    return recipe.model_copy(update={"base": beside(path, recipe.base), "data": data})
