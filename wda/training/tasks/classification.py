"""Text classification: one class for each text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from wda.checkpoints import open_base
from wda.errors import ManifestError, listing
from wda.training.rows import load_rows, require_columns
from wda.training.tasks.task import Splits, Task, load_pretrained


class Classification(Task):
    """Chooses a class; both parts of the data have the same shares of the classes."""

    kind: ClassVar[Any] = transformers.AutoModelForSequenceClassification
    peft_type: ClassVar[str] = "SEQ_CLS"
    accuracy_of: ClassVar[str] = "texts"

    @property
    def eval_batch_size(self) -> int:
        """A fixed number, for texts are short and there are few logits."""
        return 64

    @property
    def columns(self) -> list[str]:
        """Text and class."""
        return [self.recipe.data.text, self.recipe.data.label]

    def rows(self) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Read texts and classes."""
        source = self.recipe.data
        train, held_out = load_rows(source, self._numbered, source.label)
        names, others = (part.features[source.label].names for part in (train, held_out))
        if unknown := sorted(set(others) - set(names)):
            raise ManifestError(
                f"data.held_out: {source.held_out} has the classes {listing(unknown)}, which "
                f"{source.location} does not have; choose rows by data.where"
            )
        return train, held_out

    def encode(
        self,
        train: datasets.Dataset,
        held_out: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Splits:
        """Tokenise the texts, and number the classes as those trained on are numbered."""
        source = self.recipe.data
        names, others = (part.features[source.label].names for part in (train, held_out))
        numbers = [names.index(name) for name in others]

        def encode(batch: dict[str, list[Any]], numbers: Sequence[int]) -> dict[str, list[Any]]:
            encoded = tokenizer(
                batch[source.text], truncation=True, max_length=self.recipe.max_length
            )
            return {**encoded, "labels": [numbers[label] for label in batch[source.label]]}

        train, held_out = (
            part.map(
                encode, batched=True, remove_columns=part.column_names, fn_kwargs={"numbers": n}
            )
            for part, n in ((train, range(len(names))), (held_out, numbers))
        )
        return Splits(train, held_out, names)

    def _numbered(self, rows: datasets.Dataset) -> datasets.Dataset:
        """Give texts and numbered classes, after making sure that they are such."""
        source = self.recipe.data
        require_columns(rows.column_names, self.columns, source.location)
        counts = Counter(str(label) for label in rows[source.label])
        if len(counts) < 2 or min(counts.values()) < 2:
            raise ManifestError(
                f"data: {len(rows)} rows of {source.location} fit where={source.where}, with the "
                f"classes {listing(counts) or 'none'}; at least two rows of two classes are needed"
            )
        if any(not isinstance(text, str) for text in rows[source.text]):
            raise ManifestError(
                f"data.text: {source.text} of {source.location} holds what is no text; name the "
                "column with the texts"
            )
        return rows.select_columns(self.columns).class_encode_column(source.label)

    def model(self, base: Path, classes: list[str], **options: Any) -> Any:
        """Load the model, with a new head unless it has one for as many classes."""
        try:
            options = {"num_labels": len(classes), "dtype": torch.float32, **options}
            return load_pretrained(self.kind, base, **options)
        except RuntimeError as error:
            # transformers names the option that would have hidden it.
            if "ignore_mismatched_sizes" not in str(error):
                raise
            known = transformers.AutoConfig.from_pretrained(base).num_labels
            raise ManifestError(
                f"data.label: has {len(classes)} classes ({listing(classes, 4)}), "
                f"but {base} was trained to tell {known} apart; choose rows by data.where, or take "
                "a base without a head"
            ) from None

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: Any) -> Any:  # noqa: ARG002
        """Pad."""
        return transformers.DataCollatorWithPadding(tokenizer)

    def reduce(self, logits: Any, labels: torch.Tensor) -> Any:  # noqa: ARG002
        """Give the chosen classes."""
        scores = logits[0] if isinstance(logits, tuple) else logits
        return scores.argmax(dim=-1)

    def scores(self, prediction: Any) -> dict[str, float]:
        """Give the share of texts whose class is right."""
        return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}

    def new_modules(self, model: Any, base: Path) -> tuple[str, ...]:
        """Name the modules directly under the model that the base does not have: its head.

        They start at random, so an adapter alone could not carry what they learn.
        """
        stored = {name.partition(".")[0] for name in open_base(base).tensors}
        known = {model.base_model_prefix, *stored}
        return tuple(
            name
            for name, child in model.named_children()
            if name not in known and next(child.parameters(), None) is not None
        )
