"""Questions with choices: answered word by word as the paper's protocol has it, and by likelihood.

The protocol of LLM-Adapters (arXiv 2304.01933), by which the DoRA paper reports accuracy, lets the
model write greedily, takes the first of the choices it writes as its answer, and counts exact
matches. Likelihood instead asks which of the choices the model would rather write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# As many tokens as LLM-Adapters lets a model write.
_MOST_WRITTEN = 32


@dataclass(frozen=True)
class Question:
    """One held-out row, to be answered.

    Attributes
    ----------
    prompt : str
        What is given.
    right : str
        The choice that is right.
    answers : dict of str to str
        Choice → the answer that gives it.
    """

    prompt: str
    right: str
    answers: dict[str, str]


def make_question(prompt: str, answer: str, choices: Sequence[str]) -> Question | None:
    """Make a question of a row.

    Parameters
    ----------
    prompt, answer : str
        What is given, and what is right.
    choices : sequence of str
        All words that are answers; the row's own are those that its prompt names, or all.

    Returns
    -------
    Question or None
        None when the answer holds none of them.

    Examples
    --------
    >>> question = make_question("Is it so? yes/no", "It is yes.", ["yes", "no", "maybe"])
    >>> question.right, question.answers["no"]
    ('yes', 'It is no.')
    """
    right = first_choice(answer, choices)
    if right is None:
        return None
    named = [choice for choice in choices if first_choice(prompt, [choice])] or list(choices)
    own = named if right in named else [right, *named]
    return Question(prompt, right, {c: re.sub(_word(right), c, answer, count=1) for c in own})


def first_choice(text: str, choices: Sequence[str]) -> str | None:
    """Give the first of some words in a text, None when it has none of them."""
    found = re.search("|".join(map(_word, choices)), text)
    return found[0] if found else None


def answer_greedily(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    choices: Sequence[str],
    batch: int,
    longest: int,
) -> list[str | None]:
    """Let a model write, and take the first choice that it writes.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model, or an encoder and decoder.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer.
    questions : sequence of Question
        What to answer.
    choices : sequence of str
        All words that are answers.
    batch : int
        Questions at a time.
    longest : int
        Tokens that a prompt keeps, its last ones.

    Returns
    -------
    list of str or None
        One for each; None where it writes none of the choices.
    """
    written: dict[int, str] = {}
    for part in _batches([len(question.prompt) for question in questions], batch):
        given = _given(model, tokenizer, [questions[i].prompt for i in part], longest)
        out = model.generate(
            **given,
            do_sample=False,
            max_new_tokens=_MOST_WRITTEN,
            pad_token_id=tokenizer.pad_token_id,
        )
        if not model.config.is_encoder_decoder:
            out = out[:, given["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(out, skip_special_tokens=True)
        written |= dict(zip(part, texts, strict=True))
    return [first_choice(written[i], choices) for i in range(len(questions))]


def answer_by_likelihood(
    questions: Sequence[Question], losses: Callable[[Sequence[tuple[str, str]]], Tensor]
) -> list[str]:
    """Take the choice whose answer is the likeliest.

    Parameters
    ----------
    questions : sequence of Question
        What to answer.
    losses : callable
        Gives −log p of answers behind their prompts, one number for each pair.

    Returns
    -------
    list of str
        One for each.
    """
    pairs = [(q.prompt, answer) for q in questions for answer in q.answers.values()]
    each = iter(losses(pairs).tolist())
    found = []
    for question in questions:
        of_choices = {choice: next(each) for choice in question.answers}
        found.append(min(of_choices, key=lambda choice: of_choices[choice]))
    return found


def share_right(answers: Sequence[str | None], questions: Sequence[Question]) -> float:
    """Give the share of right answers, 0 to 1."""
    right = [given == asked.right for given, asked in zip(answers, questions, strict=True)]
    return sum(right) / len(right)


def _given(model: Any, tokenizer: Any, prompts: list[str], longest: int) -> dict[str, Tensor]:
    """Tokenise prompts; those of a model that writes on behind them end at the same place."""
    writes_on = not model.config.is_encoder_decoder
    before = tokenizer.padding_side, tokenizer.truncation_side
    sides = ("left", "left") if writes_on else before
    tokenizer.padding_side, tokenizer.truncation_side = sides
    limit = {"padding": True, "truncation": True, "max_length": longest}
    given = tokenizer(prompts, return_tensors="pt", **limit)
    tokenizer.padding_side, tokenizer.truncation_side = before
    ended = writes_on and bool((given["input_ids"][:, -1] == tokenizer.eos_token_id).all())
    return {
        name: given[name][:, : -1 if ended else None].to(model.device)
        for name in ("input_ids", "attention_mask")
    }


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Put what is of like length together, by its number."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _word(choice: str) -> str:
    return rf"(?<!\w){re.escape(choice)}(?!\w)"


def summed_losses(
    model: Any, rows: Sequence[dict[str, Any]], task: Any, collator: Any, batch: int
) -> Tensor:
    """Give −log p of the counted tokens of encoded rows, summed for each."""
    sums = torch.zeros(len(rows))
    for part in _batches([len(row["input_ids"]) for row in rows], batch):
        inputs = {k: v.to(model.device) for k, v in collator([rows[i] for i in part]).items()}
        losses, _ = task.reduce(model(**inputs).logits, inputs["labels"])
        sums[part] = losses.sum(dim=1).float().cpu()
    return sums
