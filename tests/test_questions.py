"""Questions with choices: by hand, one at a time, beside what the trainer answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import wda_command
from test_training_tasks import material, recipe  # noqa: F401 - a fixture
from transformers import AutoTokenizer

from wda.errors import ManifestError
from wda.training import train_recipe
from wda.training.keeping import METRICS_FILE, START_FILE
from wda.training.tasks.questions import first_choice, make_question
from wda.training.trainer import make_trainer

LETTERS = [*"abcdefghij"]
CHOICES = {"choices": LETTERS}


def test_a_rows_choices_are_those_its_prompt_names() -> None:
    asked = make_question("Answer1: x Answer2: y. Format: answer1/answer2", "it is answer2", WORDS)
    assert asked is not None
    assert (asked.right, asked.answers) == (
        "answer2",
        {"answer1": "it is answer1", "answer2": "it is answer2"},
    )
    open_ = make_question("Which?", "it is false", ["true", "false"])
    assert open_ is not None
    assert list(open_.answers) == ["true", "false"]
    assert make_question("Which?", "neither", ["true", "false"]) is None
    # A word inside another is none; the first of several counts.
    assert first_choice("untrue answer10 answer1, not answer2", WORDS) == "answer1"
    assert first_choice("nothing", WORDS) is None


WORDS = ["true", "answer1", "answer2", "answer3"]


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq"])
def test_answers_are_those_found_one_at_a_time(task: str, material: Path) -> None:  # noqa: F811
    asked = recipe(material, task, data=CHOICES | {"held_out": 0.4})
    trainer = make_trainer(asked, material / task, material / "unused")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    scores = trainer.evaluate()
    tokenizer = AutoTokenizer.from_pretrained(material / task)
    model = trainer.model.eval()
    _, held_out = trainer.task.rows()
    questions = [make_question(row["prompt"], row["answer"], LETTERS) for row in held_out]
    assert len(questions) == 24
    written, likeliest = [], []
    for question in questions:
        assert question is not None
        prompt = tokenizer(question.prompt, return_tensors="pt")["input_ids"]
        written.append(first_choice(write(model, prompt, tokenizer, task), LETTERS))
        nll = {c: by_hand(model, prompt, a, tokenizer, task) for c, a in question.answers.items()}
        assert len(nll) > 1 or len(set(question.prompt.split()) & set(LETTERS)) == 1
        likeliest.append(min(nll, key=lambda choice: nll[choice]))
    rights = [question.right for question in questions if question]
    shares = [
        sum(a == b for a, b in zip(answers, rights, strict=True)) / len(rights)
        for answers in (written, likeliest)
    ]
    assert [scores["eval_exact_match"], scores["eval_likeliest_right"]] == pytest.approx(shares)
    assert 0 < shares[1] < 1


def write(model: Any, prompt: torch.Tensor, tokenizer: Any, task: str) -> str:
    """Write greedily, token by token and without a cache."""
    end, out = tokenizer.eos_token_id, []
    for _ in range(32):
        with torch.no_grad():
            if task == "causal-lm":
                logits = model(torch.cat([prompt, torch.tensor([out], dtype=torch.long)], 1)).logits
            else:
                logits = model(input_ids=prompt, decoder_input_ids=torch.tensor([[0, *out]])).logits
        out.append(int(logits[0, -1].argmax()))
        if out[-1] == end:
            break
    return str(tokenizer.decode(out, skip_special_tokens=True))


def by_hand(model: Any, prompt: torch.Tensor, answer: str, tokenizer: Any, task: str) -> float:
    """−log p of an answer and its end."""
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    total = 0.0
    for i, token in enumerate(ids):
        before = torch.tensor([ids[:i]], dtype=torch.long)
        with torch.no_grad():
            if task == "causal-lm":
                logits = model(torch.cat([prompt, before], 1)).logits
            else:
                start = torch.tensor([[0, *ids[:i]]])
                logits = model(input_ids=prompt, decoder_input_ids=start).logits
        total -= float(logits[0, -1].log_softmax(0)[token])
    return total


def test_a_training_tells_what_was_right_before_and_after(
    material: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    asked = recipe(material, data=CHOICES, steps=30, keep=[])
    plain = recipe(material, steps=30, keep=[])
    result = train_recipe(asked, tmp_path / "run", progress=False)
    assert result.accuracy_of == "questions"
    before = json.loads((tmp_path / "run" / START_FILE).read_text())
    after = json.loads((tmp_path / "run/checkpoint-30" / METRICS_FILE).read_text())
    assert before["step"] == 0
    assert before["loss"] > after["loss"]
    assert result.accuracy == after["exact_match"]
    # Answering changes nothing of what is trained.
    assert train_recipe(plain, tmp_path / "plain", progress=False).loss == result.loss
    assert not (tmp_path / "plain" / START_FILE).exists()


def test_choices_that_do_not_fit_are_refused(material: Path, tmp_path: Path) -> None:  # noqa: F811
    asked = recipe(material, data={"choices": ["a", "b"]})
    with pytest.raises(ManifestError, match=r"data\.choices: row \d of the held-out rows has none"):
        train_recipe(asked, tmp_path / "run", progress=False)
    bad = asked.to_yaml().replace("task: causal-lm", "task: classification")
    (tmp_path / "bad.yaml").write_text(bad)
    done = wda_command("train", "bad.yaml", cwd=tmp_path)
    assert "data: answer, choices, prompt cannot be set for classification" in done.stderr
