"""Sequence to sequence: an encoder reads the prompt, a decoder writes the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from wda.training.tasks.generation import Generation
from wda.training.tasks.task import load_pretrained


class Seq2Seq(Generation):
    """Writes answers from encoded prompts."""

    peft_type: ClassVar[str] = "SEQ_2_SEQ_LM"

    def encode(
        self, prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, list[int]]:
        """Tokenise both, each cut to the greatest length."""
        limit = {"truncation": True, "max_length": self.recipe.max_length}
        encoded = tokenizer(prompt, **limit)
        labels = tokenizer(text_target=answer, **limit)["input_ids"]
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": labels,
        }

    def model(self, base: Path, classes: list[str], **options: Any) -> Any:  # noqa: ARG002
        """Load the encoder and decoder."""
        kind = transformers.AutoModelForSeq2SeqLM
        return load_pretrained(kind, base, dtype=torch.float32, **options)

    def aligned(
        self, scores: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave both: the decoder's input is shifted, its output is not."""
        return scores, labels
