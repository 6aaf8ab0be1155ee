"""Prompts and answers: what the two generating tasks share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
import transformers
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from wda.errors import ManifestError, listing
from wda.training.recipe import columns_of
from wda.training.rows import load_rows, require_columns
from wda.training.tasks.questions import (
    Question,
    answer_by_likelihood,
    answer_greedily,
    make_question,
    share_right,
    summed_losses,
)
from wda.training.tasks.task import Splits, Task, load_pretrained

# The label of a token that does not count.
IGNORED = -100


class Generation(Task):
    """Learns to write answers; of the loss and the scores, answers alone count."""

    accuracy_of: ClassVar[str] = "tokens of answers"

    @property
    def columns(self) -> list[str]:
        """Those of prompt and answer."""
        source = self.recipe.data
        return [*columns_of(source.prompt), *columns_of(source.answer)]

    def rows(self) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Fill the prompts and answers of the rows."""
        return load_rows(self.recipe.data, self._filled)

    def encode(
        self,
        train: datasets.Dataset,
        held_out: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Splits:
        """Tokenise prompts and answers."""
        tokenizer.padding_side = "right"  # a tokenizer made for generating pads on the left
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

        def encode(row: dict[str, str]) -> dict[str, list[int]]:
            return self.encode_row(row["prompt"], row["answer"], tokenizer)

        questions = self._questions(held_out)
        train, held_out = (
            part.map(encode, remove_columns=part.column_names) for part in (train, held_out)
        )
        return Splits(train, held_out, [], questions)

    def _questions(self, held_out: datasets.Dataset) -> list[Question]:
        source = self.recipe.data
        if not source.choices:
            return []
        made = [make_question(row["prompt"], row["answer"], source.choices) for row in held_out]
        if None in made:
            raise ManifestError(
                f"data.choices: row {made.index(None) + 1} of the held-out rows has none of "
                f"{listing(source.choices)} in its answer; name all choices, or other columns"
            )
        return [question for question in made if question is not None]

    def answer(self, model: Any, tokenizer: Any, questions: Sequence[Question]) -> dict[str, float]:
        """Answer by what the model writes, and by likelihood."""
        if not questions:
            return {}
        batch, choices = self.eval_batch_size, self.recipe.data.choices
        collator = self.collator(tokenizer, model)

        def losses(pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
            rows = [self.encode_row(prompt, answer, tokenizer) for prompt, answer in pairs]
            return summed_losses(model, rows, self, collator, batch)

        with torch.inference_mode():
            written = answer_greedily(
                model, tokenizer, questions, choices, batch, self.recipe.max_length
            )
            likeliest = answer_by_likelihood(questions, losses)
        return {
            "exact_match": share_right(written, questions),
            "likeliest_right": share_right(likeliest, questions),
        }

    def model(self, base: Path, classes: list[str], **options: Any) -> Any:  # noqa: ARG002
        """Load the model."""
        return load_pretrained(self.kind, base, dtype=torch.float32, **options)

    @abstractmethod
    def encode_row(
        self, prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, list[int]]:
        """Turn a prompt and its answer into tokens and labels."""

    def _filled(self, rows: datasets.Dataset) -> datasets.Dataset:
        source = self.recipe.data
        columns = self.columns
        require_columns(rows.column_names, columns, source.location)

        def fill(row: dict[str, Any]) -> dict[str, str]:
            texts = {c: "" if row[c] is None else row[c] for c in columns}
            return {
                "prompt": source.prompt.format_map(texts),
                "answer": source.answer.format_map(texts),
            }

        filled = rows.map(fill, remove_columns=rows.column_names)
        for part in ("prompt", "answer"):
            if empty := [i for i, text in enumerate(filled[part]) if not text.strip()]:
                raise ManifestError(
                    f"data.{part}: is empty in {len(empty)} of {len(filled)} rows of "
                    f"{source.location}, first in row {empty[0] + 1}; choose rows by data.where, "
                    "or other columns"
                )
        return filled

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: Any) -> Any:
        """Pad on the right, labels with what does not count."""
        return transformers.DataCollatorForSeq2Seq(
            tokenizer, model=model, label_pad_token_id=IGNORED, padding=True
        )

    def reduce(self, logits: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give −log p of every counted token, and whether it is the likeliest; else 0."""
        scores = logits[0] if isinstance(logits, tuple) else logits
        scores, labels = self.aligned(scores, labels)
        losses = functional.cross_entropy(
            scores.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return losses.view_as(labels), (scores.argmax(dim=-1) == labels).float()

    @abstractmethod
    def aligned(
        self, scores: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the scores of every token beside its label."""

    def scores(self, prediction: Any) -> dict[str, float]:
        """Give accuracy and mean loss over all tokens of the answers, and the perplexity."""
        losses, right = prediction.predictions
        counted = prediction.label_ids != IGNORED
        counted = counted[:, counted.shape[1] - losses.shape[1] :]
        loss = float(losses[counted].astype(np.float64).mean())
        return {
            "accuracy": float(right[counted].mean()),
            "loss": loss,
            "perplexity": float(np.exp(loss)),
        }
