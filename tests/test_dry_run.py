"""What a recipe would do: checked and estimated without weights, and held to what it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import wda_command
from servers import Files, serving
from test_params import of_model
from test_training import recipe

from wda.errors import DeviceError, ManifestError, OutputError
from wda.training import machine, train_recipe
from wda.training.blueprint import blueprint
from wda.training.dry_run import dry_run
from wda.training.estimate import estimate, matmul_rate
from wda.training.peak import PeakMemory
from wda.training.tasks import task_of


@pytest.mark.parametrize("method", ["ft", "lora", "dora"])
def test_what_is_kept_between_the_passes_is_what_a_real_pass_keeps(
    method: str, trainable: Path
) -> None:
    asked = recipe(trainable, method, max_length=10, batch_size=7)
    model = task_of(asked).model(trainable / "base", ["a", "b"])
    if asked.adapter is not None:
        from wda.adapters import inject

        inject(model, asked.adapter, trained_whole=("classifier",))
        # Only then does autograd need the pooler's and the layers' inputs.
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.zeros(7, 10, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.train()(input_ids=tokens, labels=tokens[:, 0])
    real = sum(storage.nbytes() for storage in kept.values())
    assert estimate(asked, blueprint(asked)).activations == pytest.approx(real, rel=0.03)


def test_arithmetic_and_memory_are_the_closed_forms(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=160, vocab_size=50,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    asked = of_model(tmp_path, batch_size=3, max_length=20, accumulation=2)
    taken = estimate(asked, blueprint(asked))
    numbers = taken.count.parameters
    assert (taken.weights, taken.trained) == (4 * numbers, 12 * numbers)
    # Twice for the products of the forward pass, four times for those of the backward pass.
    in_products = numbers - 50 * 96 - 5 * 96  # without the embedding and the norms
    attention = 2 * 2 * 20 * 20 * 96 * 3 * 2  # scores and sums, two layers, three texts
    products = 2 * in_products * 60
    # What flash-like attention computes again makes the backward pass of attention 2.5 times.
    assert taken.flop == pytest.approx(2 * (3 * products + 3.5 * attention), rel=0.03)
    short = estimate(asked, blueprint(asked), length=5)
    assert short.activations == taken.activations
    assert 3.9 < taken.flop / short.flop < 4.6
    half = asked.model_copy(update={"precision": "bfloat16"})
    assert estimate(half, blueprint(half)).activations == taken.activations // 2
    assert matmul_rate("float32", 0.01) > 1e8


def test_packed_weights_are_small() -> None:
    from wda.training import load_recipe

    folder = Path(__file__).parent.parent / "wda/recipes/paper"
    asked = load_recipe(folder / "orca-math-llama2-7b-qlora.yaml")
    small = asked.model_copy(update={"batch_size": 1, "max_length": 8})
    taken = estimate(small, blueprint(small))
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    others = taken.count.parameters - linear
    assert taken.weights == 4 * others + linear * 9 // 16  # 4.5 bits


def test_nothing_is_trained_or_written(trainable: Path, tmp_path: Path) -> None:
    found = dry_run(recipe(trainable, "dora"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    assert (found.rows, found.held_out, found.steps, found.kept) == (108, 12, 12, 3)
    assert found.disk == 5 * found.estimate.checkpoint
    assert found.length == 6
    epochs = recipe(trainable, "dora", steps=None, epochs=2, keep=[0.5])
    assert dry_run(epochs, tmp_path / "run").steps == 28


def test_all_problems_come_at_once(trainable: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("precious")
    data = {"location": str(trainable / "data.csv"), "label": "lable"}
    asked = recipe(trainable, data=data, adapter={"method": "lora", "rank": 99})
    with pytest.raises(ManifestError) as raised:
        dry_run(asked, tmp_path / "run")
    folder, columns, rank = raised.value.problems
    assert "is not empty and no run of wda" in folder
    assert "has no columns lable; it has label, source, text; did you mean label?" in (
        columns.replace("text, label, source", "label, source, text")
    )
    assert "rank: 99 is more than" in rank


def test_of_data_elsewhere_the_columns_are_looked_at(trainable: Path, tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a", "long": "x" * 3000}] * 10_000
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with serving(Files, tmp_path) as (handler, address):
        data = {"location": f"{address}/rows.jsonl", "text": "question", "label": "answer"}
        found = dry_run(recipe(trainable, data=data), tmp_path / "run")
        assert (found.rows, found.steps) == (None, 12)
        assert found.notes == (f"{address}/rows.jsonl: its columns fit; its rows were not fetched",)
        assert handler.served["rows.jsonl"] < 0.8 * (tmp_path / "rows.jsonl").stat().st_size
        wrong = recipe(trainable, data={**data, "text": "qestion"})
        with pytest.raises(ManifestError, match="no columns qestion; .* did you mean question?"):
            dry_run(wrong, tmp_path / "run")
    gone = dry_run(recipe(trainable, data=data), tmp_path / "run")
    assert gone.notes[0].startswith(f"not looked at: data.location: {address}/rows.jsonl: cannot")


def test_rows_of_a_web_server_train(trainable: Path, tmp_path: Path) -> None:
    with serving(Files, trainable) as (_, address):
        asked = recipe(
            trainable, data={"location": f"{address}/data.csv", "where": {"source": "a"}}
        )
        there = train_recipe(asked, tmp_path / "there", progress=False)
    here = train_recipe(recipe(trainable), tmp_path / "here", progress=False)
    assert there.loss == here.loss


def test_the_command_tells_and_trains_nothing(trainable: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(recipe(trainable, "dora").to_yaml())
    done = wda_command("train", "mine.yaml", "--dry-run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "108 rows, 12 held out, 6 tokens on average" in done.stdout
    assert done.stdout.endswith("nothing was trained\n")
    assert [f.name for f in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_disk_too_small_is_told_before_training(
    trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_room", lambda _: 1000)
    with pytest.raises(OutputError, match=r"3 checkpoints take 0\.00 GB .* make room, keep fewer"):
        train_recipe(recipe(trainable), tmp_path / "run", progress=False)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_precision_the_device_lacks_is_told(
    trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    with pytest.raises(DeviceError, match="precision: float16 is for GPUs, and there is none here"):
        train_recipe(recipe(trainable, precision="float16"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda _emulated: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(DeviceError, match="Tesla T4 has no bfloat16 of its own; choose float16"):
        machine.require_precision("bfloat16")


def test_labels_outside_the_heads_range_are_told(trainable: Path, tmp_path: Path) -> None:
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(trainable / "base", num_labels=5)
    model.save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(trainable / "base").save_pretrained(
        tmp_path / "base"
    )
    with pytest.raises(ManifestError, match=r"has 2 classes \(0, 1\), but .* to tell 5 apart"):
        train_recipe(recipe(trainable, base=str(tmp_path / "base")), tmp_path / "r", progress=False)


@pytest.mark.parametrize("virtual_tokens", [None, 9])
def test_rows_longer_than_the_model_are_told(
    virtual_tokens: int | None, trainable: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {}
    if virtual_tokens:
        changes = {"adapter": {"method": "prefix", "virtual_tokens": virtual_tokens}}
        match = "a row has 8 tokens and .* has places for 7; set max_length: 7 or less"
    else:
        (tmp_path / "long.csv").write_text("text,label\n" + f"{'good ' * 30},0\nbad,1\n" * 20)
        changes = {"data": {"location": str(tmp_path / "long.csv")}}
        match = "a row has 32 tokens and .* has places for 16; set max_length: 16 or less"
    with pytest.raises(ManifestError, match=match):
        train_recipe(recipe(trainable, **changes), tmp_path / "run", progress=False)


def test_peak_memory_is_seen() -> None:
    with PeakMemory() as before:
        pass
    with PeakMemory() as memory:
        torch.ones(50_000_000).sum()
    assert memory.peak - before.peak > 150e6
