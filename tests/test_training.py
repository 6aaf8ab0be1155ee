"""The trainer on a model and data small enough to train here, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from conftest import WDA, wda_command
from safetensors.torch import load_file

import wda
from wda.errors import ManifestError, MissingExtraError, OutputError
from wda.training import Recipe, finished_result, load_recipe, train_recipe, watching
from wda.training.trainer import make_trainer


def recipe(trainable: Path, method: str = "dora", **changes: Any) -> Recipe:
    content = {
        "base": str(trainable / "base"),
        "data": {"location": str(trainable / "data.csv"), "where": {"source": "a"}},
        "adapter": None if method == "ft" else {"method": method, "rank": 2, "alpha": 6},
        "steps": 12,
        "keep": [4, 8],
        "learning_rate": 5e-3,
        "batch_size": 8,
        "group_by_length": True,
        **changes,
    }
    return Recipe.model_validate(content)


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / f"checkpoint-{step}"
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["ft", "lora", "dora"])
def test_a_run_holds_what_was_asked_for(method: str, trainable: Path, tmp_path: Path) -> None:
    run = tmp_path / method
    result = train_recipe(recipe(trainable, method), run, progress=False)
    assert result.n_held_out == 12
    assert 0 <= result.accuracy <= 1
    assert {f.name for f in run.iterdir()} == {
        "checkpoint-4",
        "checkpoint-8",
        "checkpoint-12",
        "recipe.yaml",
        "result.json",
        "provenance.json",
    }
    assert load_recipe(run / "recipe.yaml") == recipe(trainable, method)
    assert not list(run.rglob("optimizer.pt"))
    table = wda.compare(run, base=trainable / "base", progress=False).table
    assert list(table["step"].unique()) == [4, 8, 12]
    assert set(table["method"]) == {method}
    assert set(table["seed"]) == {0}
    assert (table["delta_d"] > 0).all()
    assert finished_result(recipe(trainable, method), run) == result
    assert finished_result(recipe(trainable, method, seed=1), run) is None


@pytest.mark.parametrize("method", ["ft", "dora"])
def test_same_seed_same_numbers(method: str, trainable: Path, tmp_path: Path) -> None:
    results = [
        train_recipe(recipe(trainable, method, seed=seed), tmp_path / name, progress=False)
        for name, seed in (("one", 3), ("two", 3), ("three", 4))
    ]
    assert results[0].loss == results[1].loss != results[2].loss
    assert_same(weights(tmp_path / "one", 12), weights(tmp_path / "two", 12))


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize("method", ["ft", "lora", "dora"])
def test_an_interrupted_run_goes_on_to_the_same_end(
    method: str, group_by_length: bool, trainable: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    # Fourteen steps an epoch: both the checkpoint and the end lie in the middle of later ones.
    asked = recipe(trainable, method, group_by_length=group_by_length, steps=48, keep=[16, 34])
    whole = train_recipe(asked, tmp_path / "whole", progress=False)

    step_end = watching.KeepSteps.on_step_end

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 40:
            raise StoppedError
        step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(watching.KeepSteps, "on_step_end", interrupt)
        with pytest.raises(StoppedError):
            train_recipe(asked, tmp_path / "cut", progress=False)
    assert (tmp_path / "cut" / "checkpoint-34" / "optimizer.pt").is_file()
    assert not (tmp_path / "cut" / "checkpoint-16" / "optimizer.pt").exists()
    with pytest.raises(OutputError, match="holds a run already; continue it with --resume"):
        train_recipe(asked, tmp_path / "cut", progress=False)
    with pytest.raises(OutputError, match="was started with another recipe"):
        train_recipe(
            recipe(trainable, method, seed=9), tmp_path / "cut", resume=True, progress=False
        )
    # What a killed process leaves of a checkpoint is no checkpoint.
    (tmp_path / "cut" / ".unfinished" / "checkpoint-48").mkdir(parents=True)
    continued = train_recipe(asked, tmp_path / "cut", resume=True, progress=False)
    assert continued.loss == whole.loss
    assert_same(weights(tmp_path / "cut", 48), weights(tmp_path / "whole", 48))
    assert not (tmp_path / "cut" / ".unfinished").exists()
    assert train_recipe(asked, tmp_path / "cut", resume=True, progress=False) == continued


def test_the_command_trains_and_survives_being_killed(trainable: Path, tmp_path: Path) -> None:
    """A process killed at once, wherever it is, loses no more than the steps since a checkpoint."""
    file = tmp_path / "recipe.yaml"
    asked = recipe(trainable, steps=100, keep=list(range(10, 100, 10)))
    file.write_text(asked.to_yaml())
    run = tmp_path / "run"
    process = subprocess.Popen([WDA, "train", file, "--out", run], cwd=tmp_path)
    while not (run / "checkpoint-30").exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (run / "result.json").exists(), "it was over before it could be killed"
    again = wda_command("train", file, "--out", run, cwd=tmp_path)
    assert again.returncode == 1
    assert "continue it with --resume" in again.stderr
    done = wda_command("train", file, "--out", run, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = train_recipe(asked, tmp_path / "whole", progress=False)
    assert done.stdout.startswith(f"held-out accuracy {whole.accuracy:.3f}")
    assert_same(weights(run, 100), weights(tmp_path / "whole", 100))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_loads_a_trained_checkpoint(method: str, trainable: Path, tmp_path: Path) -> None:
    asked = recipe(trainable, method)
    trainer = make_trainer(asked, trainable / "base", tmp_path / "run")
    trainer.train()
    base = transformers.AutoModelForSequenceClassification.from_pretrained(trainable / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "checkpoint-12").eval()
    ids = torch.randint(5, 15, (4, 7))
    ours = trainer.model.eval()
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ft", "dora"])
def test_two_processes_train_one_run(method: str, trainable: Path, tmp_path: Path) -> None:
    """With torchrun: the batch of two processes of four is that of one process of eight."""
    alone = recipe(trainable, method, group_by_length=False, learning_rate=1e-3)
    together = alone.model_copy(update={"batch_size": 4})
    file = tmp_path / "recipe.yaml"
    file.write_text(together.to_yaml())
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29511"]
    done = subprocess.run(
        [sys.executable, *command, "-m", "wda", "train", file, "--out", tmp_path / "two"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "two"
    assert {f.name for f in run.glob("checkpoint-*")} == {f"checkpoint-{s}" for s in (4, 8, 12)}
    assert not (run / ".unfinished").exists()
    assert finished_result(together, run) is not None
    table = wda.compare(run, base=trainable / "base", progress=False).table
    assert (table["delta_d"] > 0).all()


def test_full_fine_tuning_is_loaded_by_transformers(trainable: Path, tmp_path: Path) -> None:
    train_recipe(recipe(trainable, "ft"), tmp_path / "ft", progress=False)
    folder = tmp_path / "ft" / "checkpoint-12"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    stored = weights(tmp_path / "ft", 12)
    assert torch.equal(model.classifier.weight.detach(), stored["classifier.weight"])
    assert transformers.AutoTokenizer.from_pretrained(folder)("good film")["input_ids"]


@pytest.mark.parametrize("precision", ["bfloat16"])
def test_mixed_precision_keeps_float32_weights(
    precision: str, trainable: Path, tmp_path: Path
) -> None:
    train_recipe(recipe(trainable, "dora", precision=precision), tmp_path / "run", progress=False)
    assert {t.dtype for t in weights(tmp_path / "run", 12).values()} == {torch.float32}


def test_recipes_report_every_mistake(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("base: b\ndata: {location: d}\nsteps: 0\nlearning_rat: 1\n")
    with pytest.raises(ManifestError) as caught:
        load_recipe(file)
    for part in (
        "line 3: steps: Input should be greater than 0, got 0",
        "line 4: learning_rat: no such field; fields are base, task, data",
    ):
        assert part in str(caught.value)
    file.write_text("base: b\ndata: {location: d}\nsteps: 5\nkeep: [7]\nlearning_rate: 1\n")
    with pytest.raises(ManifestError, match=r"keep: steps \[7\] lie after the last, steps: 5"):
        load_recipe(file)
    file.write_text("base: b\ndata: {location: d}\nepochs: 1\nkeep: [0.5, 1.0]\nwarmup: 1.5\n")
    with pytest.raises(ManifestError) as caught:
        load_recipe(file)
    wrong = "Input should be a whole number of steps, or a share of them below 1, got"
    assert f"line 4: keep.1: {wrong} 1.0" in str(caught.value)
    assert f"line 5: warmup: {wrong} 1.5" in str(caught.value)


def test_steps_of_epochs_are_known_with_the_data(trainable: Path, tmp_path: Path) -> None:
    """108 rows in batches of 8 are 14 steps, or 7 where two batches make one."""
    epochs = {"steps": None, "epochs": 1.5, "keep": [1 / 3, 20], "warmup": 0.1}
    asked = recipe(trainable, **epochs)
    result = train_recipe(asked, tmp_path / "run", progress=False)
    assert result.steps == 21
    assert {f.name for f in (tmp_path / "run").glob("c*")} == {
        f"checkpoint-{step}" for step in (7, 20, 21)
    }
    assert finished_result(asked, tmp_path / "run") == result
    assert asked.warmup_steps(21) == 3
    halved = recipe(trainable, **epochs, accumulation=2)
    with pytest.raises(ManifestError, match=r"steps \[20\] lie after the last, 11, for .*: 1.5;"):
        train_recipe(halved, tmp_path / "halved", progress=False)


def test_recipe_paths_start_from_the_recipe(trainable: Path) -> None:
    file = trainable / "recipe.yaml"
    content = recipe(trainable).model_dump()
    content["base"], content["data"]["location"] = "base", "data.csv"
    file.write_text(yaml.safe_dump(content))
    assert load_recipe(file) == recipe(trainable)


def test_another_length_keeps_the_same_shares(trainable: Path) -> None:
    assert recipe(trainable).with_steps(60).kept_steps(60) == [20, 40, 60]


def test_data_that_does_not_fit_is_described(trainable: Path, tmp_path: Path) -> None:
    for changes, message in [
        ({"text": "sentence"}, "has no columns sentence; it has text, label, source"),
        ({"where": {"source": "b"}}, "with the classes 1; at least two rows of two classes"),
        ({"where": {"source": "c"}}, "0 rows of .* fit where=.*; at least 2 are needed"),
    ]:
        data = {"location": str(trainable / "data.csv"), **changes}
        with pytest.raises(ManifestError, match=message):
            train_recipe(recipe(trainable, data=data), tmp_path / message[:6], progress=False)


def test_a_foreign_folder_is_not_trained_into(trainable: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="is not empty and no run of wda"):
        train_recipe(recipe(trainable), tmp_path, progress=False)


def test_a_missing_extra_says_what_to_install(
    trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(
        MissingExtraError, match=r"needs accelerate.* pip install 'weight-.*\[train\]'"
    ):
        train_recipe(recipe(trainable), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
