"""What a training survives, and what stops it: kills, full disks, losses that are no number."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import wda_command
from test_training import StoppedError, assert_same, recipe, weights

from wda.errors import OutputError, TrainingError
from wda.training import keeping, run, train_recipe
from wda.training.keeping import METRICS_FILE, KeepingTrainer

# Where in a training it is killed: a function of ours, the how manieth call, before or after it.
MOMENTS = {
    "while the recipe is written": ("Path.write_text", 1, "after"),
    "before the first checkpoint": ("watching.KeepSteps.on_step_end", 2, "before"),
    "while a checkpoint is written": ("keeping.KeepingTrainer._write_metrics", 2, "before"),
    "before it gets its name": ("keeping.KeepingTrainer._write_metrics", 2, "after"),
    "when it has its name": ("Path.rmdir", 2, "before"),
    "before the older state goes": ("keeping.drop_training_state", 2, "before"),
    "while the older state goes": ("Path.unlink", 2, "before"),
    "between checkpoints": ("watching.KeepSteps.on_step_end", 10, "after"),
    "before the result": ("run.write_text", 3, "before"),
    "after the result": ("run.write_text", 3, "after"),
    "while the last state goes": ("Path.unlink", 8, "before"),
}

KILLED = """
import os, signal, sys
from pathlib import Path
from wda.training import keeping, load_recipe, run, train_recipe, watching

where, count, when = {moment!r}
*owner, name = where.split(".")
home = eval(".".join(owner))
original, calls = getattr(home, name), []

def killing(*args, **kwargs):
    calls.append(1)
    if len(calls) == count and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(home, name, killing)
train_recipe(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]), progress=False)
"""


@pytest.mark.parametrize("method", [pytest.param("ft", marks=pytest.mark.slow), "dora"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_it_goes_on_to_the_same_end(
    moment: str,
    method: str,
    trainable: Path,
    tmp_path: Path,
) -> None:
    asked = recipe(trainable, method)
    file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(asked.to_yaml())
    code = KILLED.format(moment=MOMENTS[moment])
    killed = subprocess.run(
        [sys.executable, "-c", code, file, run], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    for folder in run.glob("checkpoint-*"):  # what is visible is whole
        assert (folder / METRICS_FILE).is_file()
        assert list(folder.glob("*.safetensors"))
    result = train_recipe(asked, run, resume=True, progress=False)
    whole = train_recipe(asked, tmp_path / "whole", progress=False)
    assert (result.loss, result.accuracy) == (whole.loss, whole.accuracy)
    for step in (4, 8, 12):
        assert_same(weights(run, step), weights(tmp_path / "whole", step))
        scores = [r / f"checkpoint-{step}" / METRICS_FILE for r in (run, tmp_path / "whole")]
        assert scores[0].read_text() == scores[1].read_text()
    assert sorted(f.name for f in run.rglob("*")) == sorted(
        f.name for f in (tmp_path / "whole").rglob("*")
    )


def test_what_is_trained_is_not_trained_again(
    trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only the result is wanting, not a step more is taken."""
    write = run.write_text

    def killed(file: Path, text: str) -> None:
        if file.name == run.RESULT_FILE:
            raise StoppedError
        write(file, text)

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_text", killed)
        with pytest.raises(StoppedError):
            train_recipe(recipe(trainable), tmp_path / "run", progress=False)
    monkeypatch.setattr(KeepingTrainer, "training_step", None)
    result = train_recipe(recipe(trainable), tmp_path / "run", resume=True, progress=False)
    assert result.steps == 12


def test_scores_lie_beside_the_weights_and_change_nothing(
    trainable: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = recipe(trainable, "dora", keep=[2, 0.5])
    result = train_recipe(asked, tmp_path / "scored", progress=False)
    found = [
        json.loads((tmp_path / "scored" / f"checkpoint-{step}" / METRICS_FILE).read_text())
        for step in (2, 6, 12)
    ]
    assert [scores["step"] for scores in found] == [2, 6, 12]
    assert (found[2]["loss"], found[2]["accuracy"]) == (result.loss, result.accuracy)
    assert len({scores["loss"] for scores in found}) == 3
    assert [scores["epoch"] for scores in found] == [2 / 14, 6 / 14, 12 / 14]
    # Linear to zero over 12 steps; the rate a step was taken with.
    rates = [5e-3 * (12 - step + 1) / 12 for step in (2, 6, 12)]
    assert [scores["learning_rate"] for scores in found] == pytest.approx(rates)
    assert all(scores["training_loss"] > 0 for scores in found)
    nothing = {"eval_accuracy": 0, "eval_loss": 0}
    monkeypatch.setattr(KeepingTrainer, "evaluate", lambda _self: nothing)
    train_recipe(asked, tmp_path / "unscored", progress=False)
    assert_same(weights(tmp_path / "scored", 12), weights(tmp_path / "unscored", 12))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["ft", "dora"])
def test_a_loss_that_is_no_number_stops_with_the_last_good_checkpoint(
    method: str,
    accumulation: int,
    trainable: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of several forward passes of a step it is one alone, and not the last."""
    run, compute, passes = tmp_path / "run", KeepingTrainer.compute_loss, []

    def lost(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        if self.model.training and not kwargs.get("return_outputs"):
            passes.append(1)
            return loss * torch.nan if len(passes) == 6 * accumulation + 1 else loss
        return loss

    monkeypatch.setattr(KeepingTrainer, "compute_loss", lost)
    with pytest.raises(TrainingError) as caught:
        train_recipe(recipe(trainable, method, accumulation=accumulation), run, progress=False)
    assert str(caught.value) == (
        f"{run}: the loss is no number any more at step 7; the last good checkpoint is "
        f"{run / 'checkpoint-4'}; try a learning rate below 0.005, a warm-up, in a new folder"
    )
    assert {f.name for f in run.glob("checkpoint-*")} == {"checkpoint-4"}


def test_weights_that_are_no_numbers_are_not_kept(
    trainable: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loss was finite still, but not the step it led to."""
    keep = keeping.KeepingTrainer.require_finite_losses

    def spoil(self: Any) -> None:
        keep(self)
        if self.state.global_step == 8:
            next(p for p in self.model.parameters() if p.requires_grad).data.fill_(torch.inf)

    monkeypatch.setattr(KeepingTrainer, "require_finite_losses", spoil)
    with pytest.raises(TrainingError, match=r"no number any more at step 8; the last .*point-4;"):
        train_recipe(recipe(trainable), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "checkpoint-8").exists()


@pytest.mark.parametrize("method", ["ft", "dora"])
def test_a_full_disk_leaves_whole_checkpoints_and_goes_on(
    method: str,
    trainable: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, asked = tmp_path / "run", recipe(trainable, method)
    with monkeypatch.context() as patch:
        write = torch.save

        def full(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            if "checkpoint-8" in str(file):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            write(content, file, *args, **kwargs)

        patch.setattr(torch, "save", full)
        with pytest.raises(OutputError) as caught:
            train_recipe(asked, run, progress=False)
    assert str(caught.value) == (
        f"{run}: a checkpoint could not be written: the disk is full; checkpoint-4 is whole; make "
        "room and go on with --resume"
    )
    assert {f.name for f in run.iterdir() if f.is_dir()} == {"checkpoint-4"}
    train_recipe(asked, run, resume=True, progress=False)
    train_recipe(asked, tmp_path / "whole", progress=False)
    assert_same(weights(run, 12), weights(tmp_path / "whole", 12))


@pytest.mark.slow
def test_a_disk_that_is_really_full(trainable: Path, tmp_path: Path) -> None:
    """On a small file system of its own, where one may be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", small],
        check=False,
        capture_output=True,
    )
    if mounted.returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        file = tmp_path / "recipe.yaml"
        file.write_text(recipe(trainable, "ft").to_yaml())
        done = wda_command("train", file, "--out", small / "run", cwd=tmp_path)
        assert done.returncode == 1
        assert "a checkpoint could not be written: the disk is full" in done.stderr
        assert done.stderr.count("\n") == 1
    finally:
        subprocess.run(["umount", small], check=True)


def test_an_interruption_says_how_to_go_on(trainable: Path, tmp_path: Path) -> None:
    file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(recipe(trainable, steps=2000, keep=[1]).to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-m", "wda", "train", file, "--out", run],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    while not (run / "checkpoint-1").exists() and process.poll() is None:
        pass
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert said == f"wda: interrupted; go on with: wda train {file} --out {run} --resume\n"


@pytest.mark.parametrize(
    "setting", [{"accumulation": 2, "batch_size": 4}, {"gradient_checkpointing": True}]
)
def test_accumulation_and_checkpointing_give_the_same_loss(
    setting: dict[str, Any],
    trainable: Path,
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    shutil.copytree(trainable / "base", base)
    config = json.loads((base / "config.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(config | still))
    plain = {"base": str(base), "group_by_length": False, "learning_rate": 1e-3}
    for method in ("lora", "dora"):
        results = [
            train_recipe(
                recipe(trainable, method, **plain, **changes), tmp_path / name, progress=False
            )
            for name, changes in ((f"{method}-plain", {}), (f"{method}-other", setting))
        ]
        # Rounding decides the sign of Adam's step where a gradient is nearly zero.
        assert results[1].loss == pytest.approx(results[0].loss, rel=1e-4)
