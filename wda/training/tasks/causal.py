"""Instruction tuning of causal language models."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from wda.training.tasks.generation import IGNORED, Generation


class CausalLM(Generation):
    """Continues prompts with answers."""

    peft_type: ClassVar[str] = "CAUSAL_LM"
    kind: ClassVar[Any] = transformers.AutoModelForCausalLM

    def encode_row(
        self, prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, list[int]]:
        """Put the answer and an end behind the prompt.

        Where both are too long it is the prompt that is cut, on its left: without its answer a row
        would teach nothing.
        """
        given, wanted = self.tokens(prompt, answer, tokenizer)
        wanted = wanted[: self.recipe.max_length]
        given = given[max(0, len(given) + len(wanted) - self.recipe.max_length) :]
        return {
            "input_ids": [*given, *wanted],
            "attention_mask": [1] * (len(given) + len(wanted)),
            "labels": [*[IGNORED] * len(given), *wanted],
        }

    def tokens(
        self, prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[int], list[int]]:
        """Tokenise both, the prompt with the model's beginning, the answer with its end."""
        end = tokenizer.eos_token_id
        given = tokenizer(prompt)["input_ids"]
        if given and given[-1] == end:
            given = given[:-1]
        return given, [*tokenizer(answer, add_special_tokens=False)["input_ids"], end]

    def aligned(
        self, scores: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift by one: every token is predicted from those before it."""
        return scores[:, :-1], labels[:, 1:]
