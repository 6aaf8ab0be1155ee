"""Tasks and data of the trainer: what counts in the loss, what is scored, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
from adapted import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional

import wda
from wda.errors import LocationError, ManifestError, WdaError
from wda.training import Recipe, train_recipe
from wda.training.keeping import METRICS_FILE
from wda.training.tasks import task_of
from wda.training.tasks.causal import CausalLM
from wda.training.tasks.generation import IGNORED
from wda.training.tasks.task import load_pretrained
from wda.training.trainer import make_trainer

KINDS = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
}
WORDS = [*"abcdefghij", "question", "answer", ":", "is", "what", "?"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
VOCABULARY = len(SPECIAL) + len(WORDS)


def tokenizer(begin: bool = True) -> transformers.PreTrainedTokenizerFast:
    """Words of a small vocabulary, with LLaMA's beginning or T5's end."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "<s> $A" if begin else "$A </s>"
    words.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=None if begin else "<pad>",
    )


def t5() -> Any:
    config = transformers.T5Config(
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return transformers.T5ForConditionalGeneration(config)


ROWS = [
    {
        "question": f"what is {' '.join(WORDS[(i + j) % 10] for j in range(1 + i % 4))} ?",
        "letter": " ".join(WORDS[(i + j) % 10] for j in range(1 + i % 3)),
        "kind": "easy" if i % 3 else "hard",
    }
    for i in range(60)
]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases with their tokenizers, and the same rows in every format."""
    folder = tmp_path_factory.mktemp("material")
    torch.manual_seed(0)
    for name, model in (("causal-lm", tiny_llama(vocab_size=VOCABULARY)), ("seq2seq", t5())):
        model.save_pretrained(folder / name)
        tokenizer(begin=name == "causal-lm").save_pretrained(folder / name)
    rows = datasets.Dataset.from_list(ROWS)
    rows.to_csv(folder / "rows.csv")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    rows.to_parquet(folder / "rows.parquet")
    splits = datasets.DatasetDict(train=rows.select(range(50)), test=rows.select(range(50, 60)))
    splits.save_to_disk(folder / "saved")
    (folder / "files").mkdir()
    splits["train"].to_json(folder / "files" / "train.jsonl")
    splits["test"].to_json(folder / "files" / "test.jsonl")
    return folder


def recipe(material: Path, task: str = "causal-lm", **changes: Any) -> Recipe:
    data = {
        "location": str(material / "rows.jsonl"),
        "prompt": "question : {question} answer :",
        "answer": "{letter}",
        **changes.pop("data", {}),
    }
    query = "q_proj" if task == "causal-lm" else "q"
    content = {
        "base": str(material / task),
        "task": task,
        "data": data,
        "adapter": {"method": "dora", "rank": 2, "alpha": 6, "targets": [f"re:{query}$"]},
        "steps": 6,
        "keep": [0.5],
        "learning_rate": 1e-2,
        "batch_size": 4,
        **changes,
    }
    return Recipe.model_validate(content)


def test_answers_alone_have_labels_and_prompts_lose_their_beginning(material: Path) -> None:
    words = tokenizer()
    task = CausalLM(recipe(material, max_length=8))
    one = task.encode_row("what is a", "b c", words)
    assert words.decode(one["input_ids"]) == "<s> what is a b c </s>"
    assert one["labels"] == [IGNORED] * 4 + one["input_ids"][4:]
    long = task.encode_row("what is a b c d e f g", "h i", words)
    assert words.decode(long["input_ids"]) == "c d e f g h i </s>"
    assert long["labels"] == [IGNORED] * 5 + long["input_ids"][5:]
    too_long = task.encode_row("what", "a b c d e f g h i j", words)
    assert words.decode(too_long["input_ids"]) == "a b c d e f g h"


def test_batches_are_padded_on_the_right(material: Path) -> None:
    words = tokenizer()
    words.padding_side = "left"
    task = task_of(recipe(material))
    rows = task.splits(words).train.select(range(8))
    batch = task.collator(words, None)(list(rows))
    assert (batch["attention_mask"][:, 0] == 1).all()
    assert (batch["attention_mask"][:, -1] == 0).any()


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq"])
def test_loss_and_scores_are_those_of_the_answers_tokens(task: str, material: Path) -> None:
    """By hand, one row at a time in float64."""
    trainer = make_trainer(recipe(material, task), material / task, material / "unused")
    trainer.model.double()
    scores = trainer.evaluate()
    losses, right = [], []
    model = trainer.model.eval()
    for row in trainer.eval_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            if task == "causal-lm":
                logits, labels = model(ids).logits[0, :-1], labels[0, 1:]
            else:
                logits, labels = model(input_ids=ids, labels=labels).logits[0], labels[0]
        counted = labels != IGNORED
        losses.append(functional.cross_entropy(logits[counted], labels[counted], reduction="none"))
        right.append(logits[counted].argmax(dim=-1) == labels[counted])
    loss = float(torch.cat(losses).mean())
    assert scores["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert scores["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert scores["eval_accuracy"] == pytest.approx(float(torch.cat(right).double().mean()))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    loss = trainer.model(**batch).loss
    counted = batch["labels"] != IGNORED
    assert 0 < counted.sum() < counted.numel()
    logits = trainer.model(**batch).logits
    if task == "causal-lm":
        logits, counted = logits[:, :-1], counted[:, 1:]
        wanted = batch["labels"][:, 1:][counted]
    else:
        wanted = batch["labels"][counted]
    by_hand = functional.cross_entropy(logits[counted], wanted)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("task", ["causal-lm", "seq2seq"])
@pytest.mark.parametrize("method", ["ft", "lora", "dora", "vera", "dvora"])
def test_every_task_is_trained_scored_and_compared(
    method: str, task: str, material: Path, tmp_path: Path
) -> None:
    asked = recipe(material, task)
    assert asked.adapter is not None
    alpha = {"alpha": 6} if method in ("lora", "dora") else {}
    adapter = {"method": method, "rank": 2, "targets": asked.adapter.targets, **alpha}
    asked = recipe(material, task, adapter=None if method == "ft" else adapter)
    run = tmp_path / method
    result = train_recipe(asked, run, progress=False)
    assert result.accuracy_of == "tokens of answers"
    assert result.n_held_out == 6
    kept = [json.loads((run / f"checkpoint-{s}" / METRICS_FILE).read_text()) for s in (3, 6)]
    assert [scores["step"] for scores in kept] == [3, 6]
    assert kept[1]["loss"] == result.loss != kept[0]["loss"]
    table = wda.compare(run, base=material / task, matrices="re:q(_proj)?$", progress=False).table
    assert set(table["method"]) == {method}
    assert (table["delta_m"] > 0).all()
    if method in ("lora", "dora", "vera"):
        config = json.loads((run / "checkpoint-6" / "adapter_config.json").read_text())
        assert config["task_type"] == {"causal-lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}[task]
        base = load_pretrained(KINDS[task], material / task)
        theirs = peft.PeftModel.from_pretrained(base, run / "checkpoint-6")
        trainer = make_trainer(asked, material / task, tmp_path / "unused")
        trainer._load_from_checkpoint(str(run / "checkpoint-6"))
        ids = torch.randint(4, 20, (2, 5))
        given = {"input_ids": ids, "labels": ids}
        with torch.no_grad():
            ours = trainer.model.eval()(**given).logits
            torch.testing.assert_close(ours, theirs.eval()(**given).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("task", ["causal-lm", "seq2seq"])
def test_prefixes_are_trained_and_go_on(task: str, material: Path, tmp_path: Path) -> None:
    asked = recipe(material, task, adapter={"method": "prefix", "virtual_tokens": 3})
    result = train_recipe(asked, tmp_path / "run", progress=False)
    assert 0 < result.trainable < result.parameters
    (tmp_path / "run" / "result.json").unlink()
    again = train_recipe(asked, tmp_path / "run", resume=True, progress=False)
    assert again.loss == result.loss
    base = load_pretrained(KINDS[task], material / task)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "checkpoint-6")
    assert theirs.active_peft_config.num_virtual_tokens == 3


@pytest.mark.parametrize("file", ["rows.csv", "rows.json", "rows.jsonl", "rows.parquet"])
def test_every_format_gives_the_same_rows(file: str, material: Path) -> None:
    words = tokenizer()
    asked = recipe(material, data={"location": str(material / file), "where": {"kind": "easy"}})
    expected = recipe(material, data={"where": {"kind": "easy"}})
    found, wanted = (task_of(r).splits(words) for r in (asked, expected))
    assert found.train.to_list() == wanted.train.to_list()
    assert len(found.train) + len(found.held_out) == 40


@pytest.mark.parametrize("folder", ["saved", "files"])
def test_splits_of_a_dataset_are_used_as_they_are(folder: str, material: Path) -> None:
    data = {"location": str(material / folder), "held_out": "test", "samples": 20}
    splits = task_of(recipe(material, data=data)).splits(tokenizer())
    assert (len(splits.train), len(splits.held_out)) == (20, 10)
    other = {"held_out": str(material / "files" / "test.jsonl")}
    splits = task_of(recipe(material, data=other)).splits(tokenizer())
    assert (len(splits.train), len(splits.held_out)) == (60, 10)


REFUSED: dict[str, tuple[dict[str, Any], type[WdaError], str]] = {
    "no such column": (
        {"prompt": "{qestion}"},
        ManifestError,
        r"has no columns qestion; it has question, letter, kind; did you mean question\?$",
    ),
    "empty": ({"where": {"kind": "medium"}}, ManifestError, r"^data: 0 rows of .* at least 2 are"),
    "too few": ({"samples": 100}, ManifestError, r"samples=100; at least 100 are needed$"),
    "no split": (
        {"location": "saved", "split": "dev", "held_out": "test"},
        ManifestError,
        r"^data.split: .* has no split 'dev'; it has train, test$",
    ),
    "another kind": ({"location": "notes.txt"}, LocationError, r"ends in .txt; files in .csv, .js"),
    "not what it says": (
        {"location": "broken.parquet"},
        ManifestError,
        r"^data.location: .*broken.parquet: cannot be read as a table: ",
    ),
    "empty answers": (
        {"location": "silent.jsonl"},
        ManifestError,
        r"^data.answer: is empty in 2 of 3 rows of .*, first in row 2; choose rows by data.where",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_do_not_fit_are_refused_in_a_line(
    case: str, material: Path, tmp_path: Path
) -> None:
    (material / "notes.txt").write_text("")
    (material / "broken.parquet").write_text("question,letter")
    silent = [{"question": "what", "letter": letter} for letter in ("a", "", " ")]
    (material / "silent.jsonl").write_text("\n".join(map(json.dumps, silent)))
    changes, kind, message = REFUSED[case]
    if "location" in changes:
        changes = {**changes, "location": str(material / changes["location"])}
    with pytest.raises(kind, match=message) as caught:
        train_recipe(recipe(material, data=changes), tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({"steps": None}, "steps, epochs: give one of the two"),
    "both": ({"epochs": 2}, "steps, epochs: give one of the two"),
    "no answer": ({"data": {"answer": ""}}, "data: causal-lm needs answer"),
    "foreign": ({"data": {"label": "letter"}}, "data: label cannot be set for causal-lm"),
    "no column": ({"data": {"prompt": "what is it?"}}, r"data.prompt: needs a column in braces"),
    "open brace": ({"data": {"prompt": "{question"}}, "data.prompt: .*; double a brace"),
    "a share of one": ({"keep": [1.5]}, "a whole number of steps, or a share of them below 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_recipes_that_contradict_themselves_are_refused(case: str, material: Path) -> None:
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        recipe(material, **changes)


def test_steps_shares_and_epochs() -> None:
    content = {"base": "b", "data": {"location": "d.csv"}, "batch_size": 4, "accumulation": 2}
    asked = Recipe(**content, epochs=2.5, keep=[0.1, 0.5, 3], warmup=0.06)
    assert asked.all_steps(100) == 33  # 13 steps an epoch
    assert asked.all_steps(100, processes=2) == 18
    assert asked.kept_steps(33) == [3, 16, 33]
    assert asked.warmup_steps(33) == 2
    assert Recipe(**content, steps=7, warmup=3).warmup_steps(7) == 3


def test_learning_rates_of_the_methods() -> None:
    content = {"base": "b", "data": {"location": "d.csv"}, "steps": 1}
    rates = {
        method: Recipe(**content, adapter=None if method == "ft" else {"method": method}).rate
        for method in ("ft", "lora", "dora", "vera")
    }
    assert rates["ft"] < rates["dora"] < rates["lora"] < rates["vera"]
    assert Recipe(**content, learning_rate=0.5).rate == 0.5


@pytest.mark.parametrize("quantised", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_packed_base_is_kept_and_compared_with(
    method: str, quantised: str, material: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "num_key_value_heads": 4}
    config = tiny_llama(vocab_size=VOCABULARY).config
    config.update(shape)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    adapter = {"method": method, "rank": 2, "alpha": 6, "targets": ["query", "down"]}
    asked = recipe(
        material,
        base=str(tmp_path / "model"),
        adapter=adapter,
        quantised=quantised,
        learning_rate=1e-4,
    )
    result = train_recipe(asked, tmp_path / "run", progress=False)
    assert result.loss > 0
    comparison = wda.compare(tmp_path / "run", matrices=["query", "down"], progress=False)
    assert set(comparison.table["method"]) == {f"q{method}"}
    assert (comparison.table["delta_d"] > 0).all()
    # Without the packing's own noise, which is larger than what six steps change.
    against = wda.compare(
        tmp_path / "run",
        base=tmp_path / "model",
        matrices=["query", "down"],
        w0="original",
        progress=False,
    )
    assert comparison.table["delta_d"].mean() < against.table["delta_d"].mean() / 2


def test_packed_weights_are_not_trained(material: Path) -> None:
    for changes, message in [
        ({"adapter": None}, "packed weights cannot be trained, as ft would"),
        ({"adapter": {"method": "weightnorm"}}, "cannot be trained, as weightnorm would"),
    ]:
        with pytest.raises(ValueError, match=message):
            recipe(material, quantised="nf4", **changes)
    with pytest.raises(ValueError, match="quantised: is for causal-lm and seq2seq"):
        Recipe(base="b", data={"location": "d.csv"}, steps=1, quantised="nf4")
