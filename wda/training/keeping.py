"""Transformers' Trainer, keeping chosen checkpoints whole, ours in PEFT's layout."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from wda.adapters import load_adapter, save_adapter
from wda.errors import OutputError, TrainingError
from wda.files import write_text
from wda.training.recipe import Recipe
from wda.training.tasks import Task

METRICS_FILE, START_FILE = "metrics.json", "start.json"

# What a checkpoint needs for going on, and the analysis does not.
_TRAINING_STATE = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")

_UNFINISHED = ".unfinished"


class KeepingTrainer(Trainer):  # type: ignore[misc]
    """Trains by a recipe.

    A checkpoint is written in a scratch folder, its held-out scores with it, and appears under its
    name when it is whole. The optimiser's state is kept with the newest checkpoint alone, for it
    is twice the model's size.

    Parameters
    ----------
    recipe : Recipe
        What is trained.
    task : Task
        What for.
    trained_whole : tuple of str
        Modules trained beside an adapter, saved with it.
    base : str
        Location of what an adapter is trained on.
    answer : callable
        Answers the held-out questions, if there are any, and gives the shares that are right.
    **kwargs
        For ``transformers.Trainer``.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        trained_whole: tuple[str, ...],
        base: str,
        answer: Callable[[], dict[str, float]],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.answer = answer
        self.recipe = recipe
        self.task = task
        self.trained_whole = trained_whole
        self.base = base
        self._saving = False
        # The first step whose loss was no number; where the loss is, so that no step waits for it.
        self._lost: Tensor | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute a loss and its gradients, and note whether it is a number."""
        loss: Tensor = super().training_step(*args, **kwargs)
        step = torch.full_like(loss, self.state.global_step + 1, dtype=torch.int64)
        lost = torch.where(loss.isfinite(), 0, step)
        self._lost = lost if self._lost is None else torch.where(self._lost > 0, self._lost, lost)
        return loss

    def require_finite_losses(self) -> None:
        """Stop a training that has lost its way.

        Raises
        ------
        TrainingError
            When a loss was not finite.
        """
        self._stop(0 if self._lost is None else int(self._lost))

    def _require_finite_weights(self) -> None:
        """Refuse to keep weights that are no numbers, as one step's gradient can make them."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        finite = all(bool(p.isfinite().all()) for p in trained)
        self._stop(0 if finite else self.state.global_step)

    def _stop(self, step: int) -> None:
        if step > 0:
            last = last_checkpoint(Path(self.args.output_dir))
            good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            half = " or bfloat16 instead of float16" if self.recipe.precision == "float16" else ""
            raise TrainingError(
                f"{self.args.output_dir}: the loss is no number any more at step {step}; {good}; "
                f"try a learning rate below {self.recipe.rate:g}, a warm-up{half}, in a new folder"
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the held-out rows; the training's random numbers go on as if it had not been."""
        device = self.args.device
        devices = [] if device.type == "cpu" else [device.index or 0]
        kind = device.type if devices else "cuda"
        with torch.random.fork_rng(devices, device_type=kind):
            scores: dict[str, float] = super().evaluate(*args, **kwargs)
            self.model.eval()
            answered = {f"eval_{name}": share for name, share in self.answer().items()}
        return {**scores, **answered}

    def score_start(self) -> None:
        """Write the held-out scores before the first step, where there are questions."""
        file = Path(self.args.output_dir) / START_FILE
        if not self.recipe.data.choices or file.is_file():
            return
        scores = _known(self.evaluate())
        if self.args.should_save:
            write_text(file, json.dumps({"step": 0, **scores}, indent=2) + "\n")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.recipe.group_by_length:
            return super()._get_train_sampler(train_dataset)
        texts = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(tokens) for tokens in texts["input_ids"]]
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochSampler(lengths, batch_size, self.args.seed)

    def _get_output_dir(self, trial: Any) -> str:
        run_folder: str = super()._get_output_dir(trial)
        return str(Path(run_folder) / _UNFINISHED) if self._saving else run_folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.require_finite_losses()
        self._require_finite_weights()
        scores = self.evaluate()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self._write_metrics(scores)
        except (OSError, SafetensorError, RuntimeError) as error:  # the last is torch.save's
            raise _unwritten(error, Path(self.args.output_dir)) from error
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()  # every process writes its random state
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            run_folder = Path(self._get_output_dir(trial))
            # A run that begins anew, for its newest state is gone, comes by its old checkpoints.
            shutil.rmtree(run_folder / name, ignore_errors=True)
            (run_folder / _UNFINISHED / name).replace(run_folder / name)
            (run_folder / _UNFINISHED).rmdir()
            drop_training_state(run_folder, but=name)
        self.accelerator.wait_for_everyone()

    def _write_metrics(self, scores: dict[str, float]) -> None:
        """Write the held-out scores beside the weights, with what was logged at this step."""
        step = self.state.global_step
        logged = [line for line in self.state.log_history if "loss" in line][-1]
        metrics = {
            "step": step,
            "epoch": self.state.epoch,
            "learning_rate": logged["learning_rate"],
            "training_loss": logged["loss"],
            **_known(scores),
        }
        folder = Path(self._get_output_dir(None)) / f"checkpoint-{step}"
        (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.recipe.adapter is None:
            super()._save(output_dir, state_dict)
            return
        save_adapter(
            self.model,
            self.recipe.adapter,
            Path(output_dir or self.args.output_dir),
            base=self.base,
            trained_whole=self.trained_whole,
            task_type=self.task.peft_type,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.recipe.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter(model or self.model, Path(resume_from_checkpoint), self.trained_whole)


def _known(scores: dict[str, float]) -> dict[str, float]:
    """Give the scores without what only tells how long scoring took."""
    named = {k.removeprefix("eval_"): v for k, v in scores.items() if k.startswith("eval_")}
    timed = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    return {name: score for name, score in named.items() if name not in timed}


class EpochSampler(LengthGroupedSampler):  # type: ignore[misc]
    """Groups texts of like length, in an order that seed and epoch alone decide.

    A resumed run so sees in the middle of an epoch what it would have seen.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()  # type: ignore[no-any-return]


def _unwritten(error: Exception, run_folder: Path) -> OutputError:
    """Say what could not be written, and what is still there."""
    no_room = (errno.ENOSPC, errno.EDQUOT)
    full = getattr(error, "errno", None) in no_room or "No space left" in str(error)
    full |= shutil.disk_usage(run_folder).free < 2**20
    why = "the disk is full" if full else str(error).splitlines()[0]
    shutil.rmtree(run_folder / _UNFINISHED, ignore_errors=True)
    last = last_checkpoint(run_folder)
    kept = f"{last.name} is whole; " if last else ""
    return OutputError(
        f"{run_folder}: a checkpoint could not be written: {why}; {kept}make room and go on with "
        "--resume"
    )


def last_checkpoint(run_folder: Path) -> Path | None:
    """Give the newest checkpoint that training can go on from, clearing away unfinished ones."""
    shutil.rmtree(run_folder / _UNFINISHED, ignore_errors=True)
    steps = {
        int(state.parent.name.removeprefix("checkpoint-")): state.parent
        for state in run_folder.glob("checkpoint-*/optimizer.pt")
    }
    return steps[max(steps)] if steps else None


def drop_training_state(run_folder: Path, but: str | None = None) -> None:
    """Delete the optimiser's state from a run's checkpoints, but for one."""
    for pattern in _TRAINING_STATE:
        for file in run_folder.glob(f"checkpoint-*/{pattern}"):
            if file.parent.name != but:
                file.unlink(missing_ok=True)
