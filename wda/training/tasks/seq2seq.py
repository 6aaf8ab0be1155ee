"""Sequence to sequence: an encoder reads the prompt, a decoder writes the answer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from wda.training.tasks.generation import Generation


class Seq2Seq(Generation):
    """Writes answers from encoded prompts."""

    peft_type: ClassVar[str] = "SEQ_2_SEQ_LM"
    kind: ClassVar[Any] = transformers.AutoModelForSeq2SeqLM

    def encode_row(
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

    def aligned(
        self, scores: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave both: the decoder's input is shifted, its output is not."""
        return scores, labels
