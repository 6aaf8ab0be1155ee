"""What all tasks have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from wda.training.recipe import Recipe
from wda.training.tasks.questions import Question


@dataclass(frozen=True)
class Splits:
    """Encoded rows to train on and to test on.

    Attributes
    ----------
    train, held_out : Dataset
        With ``input_ids``, ``attention_mask`` and ``labels``.
    classes : list of str
        The names of the classes in order of their number, where there are classes.
    questions : list of Question
        What is answered of the held-out rows, where there are choices.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset
    classes: list[str]
    questions: list[Question] = field(default_factory=list)

    @property
    def parts(self) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Both."""
        return self.train, self.held_out


class Task(ABC):
    """One task of a recipe.

    Parameters
    ----------
    recipe : Recipe
        Data, lengths and the base.
    """

    kind: ClassVar[Any]
    peft_type: ClassVar[str]
    accuracy_of: ClassVar[str]

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """The columns that the data must have, beside those of ``where``."""

    @abstractmethod
    def rows(self) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Read the rows to train on and those held out, and make sure that they fit.

        Raises
        ------
        ManifestError
            When they do not.
        """

    @abstractmethod
    def encode(
        self,
        train: datasets.Dataset,
        held_out: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Splits:
        """Tokenise rows."""

    def splits(self, tokenizer: PreTrainedTokenizerBase) -> Splits:
        """Read the rows and tokenise them."""
        return self.encode(*self.rows(), tokenizer)

    @abstractmethod
    def model(self, base: Path, classes: list[str], **options: Any) -> Any:
        """Load the pre-trained model, in float32; transformers' options may pack it."""

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase, model: Any) -> Any:
        """Give what makes a batch of encoded rows."""

    @abstractmethod
    def reduce(self, logits: Any, labels: torch.Tensor) -> Any:
        """Turn a batch's logits into what the scores need, so that logits are not gathered."""

    @abstractmethod
    def scores(self, prediction: Any) -> dict[str, float]:
        """Give accuracy, and what else there is, of all that was reduced."""

    def answer(self, model: Any, tokenizer: Any, questions: Sequence[Question]) -> dict[str, float]:  # noqa: ARG002
        """Answer questions, and give the shares that are right; nothing where there are none."""
        return {}

    @property
    def eval_batch_size(self) -> int:
        """Rows of a forward pass without gradients."""
        return self.recipe.batch_size

    def new_modules(self, model: Any, base: Path) -> tuple[str, ...]:  # noqa: ARG002
        """Name the modules that the pre-trained model does not have: none."""
        return ()


def load_pretrained(kind: Any, base: Path, **options: Any) -> Any:
    """Load a folder or a GGUF file by a class of transformers, a model in float32."""
    if base.suffix != ".gguf":
        return kind.from_pretrained(base, **options)
    loaded = kind.from_pretrained(base.parent, gguf_file=base.name, **options)
    if getattr(loaded, "is_quantized", False):
        # Its numbers are float32 by now, whatever transformers still calls the model.
        loaded.is_quantized, loaded.hf_quantizer = False, None
        del loaded.config.quantization_config
    return loaded
