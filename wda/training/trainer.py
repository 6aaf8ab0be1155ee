"""Transformers' Trainer, keeping chosen checkpoints whole, ours in PEFT's layout."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from rich.progress import Progress, TaskID
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from wda.adapters import inject, load_adapter, save_adapter
from wda.checkpoints import open_base
from wda.training.data import load_splits
from wda.training.recipe import Recipe

# What a checkpoint needs for going on, and the analysis does not.
_TRAINING_STATE = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")

_UNFINISHED = ".unfinished"

# Recipe's word → transformers' name of the schedule that honours a warm-up.
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class KeepingTrainer(Trainer):  # type: ignore[misc]
    """Trains by a recipe.

    A checkpoint is written in a scratch folder and appears under its name when it is whole. The
    optimiser's state is kept with the newest checkpoint alone, for it is twice the model's size.

    Parameters
    ----------
    recipe : Recipe
        What is trained.
    trained_whole : tuple of str
        Modules trained beside an adapter, saved with it.
    **kwargs
        For ``transformers.Trainer``.
    """

    def __init__(self, recipe: Recipe, trained_whole: tuple[str, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe = recipe
        self.trained_whole = trained_whole
        self._saving = False

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
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()  # every process writes its random state
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            run_folder = Path(self._get_output_dir(trial))
            (run_folder / _UNFINISHED / name).replace(run_folder / name)
            (run_folder / _UNFINISHED).rmdir()
            drop_training_state(run_folder, but=name)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.recipe.adapter is None:
            super()._save(output_dir, state_dict)
            return
        save_adapter(
            self.model,
            self.recipe.adapter,
            Path(output_dir or self.args.output_dir),
            base=self.recipe.base,
            trained_whole=self.trained_whole,
            task_type="SEQ_CLS",
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.recipe.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter(model or self.model, Path(resume_from_checkpoint), self.trained_whole)


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


class KeepSteps(TrainerCallback):  # type: ignore[misc]
    """Saves a checkpoint at the recipe's steps and at no other."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = set(steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Ask for a checkpoint at a chosen step."""
        control.should_save = state.global_step in self.steps


class ShowProgress(TrainerCallback):  # type: ignore[misc]
    """Moves a progress bar of the training, with the loss beside it, and one of the testing."""

    def __init__(self, bar: Progress, name: str, steps: int) -> None:
        self.bar = bar
        self.name = name
        self.training = bar.add_task(f"training {name}", total=steps, note="")
        self.testing: TaskID | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Show the step."""
        self.bar.update(self.training, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Show the loss."""
        loss = (kwargs.get("logs") or {}).get("loss")
        if loss is not None:
            self.bar.update(self.training, note=f"loss {float(loss):.3f}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Show the batch of the held-out texts."""
        if self.testing is None:
            batches = len(kwargs["eval_dataloader"])
            self.testing = self.bar.add_task(f"testing {self.name}", total=batches, note="")
        self.bar.advance(self.testing)


def make_trainer(
    recipe: Recipe, base_folder: Path, data_file: Path, run_folder: Path
) -> KeepingTrainer:
    """Load model and data, inject the adapter if there is one, and make the trainer.

    Parameters
    ----------
    recipe : Recipe
        What is trained.
    base_folder, data_file, run_folder : Path
        The pre-trained model, the data, and where checkpoints go.

    Returns
    -------
    KeepingTrainer
        Ready to train; silent but for errors.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)

    tokenizer = transformers.AutoTokenizer.from_pretrained(base_folder)
    splits = load_splits(recipe.data, data_file, tokenizer, recipe.max_length)
    transformers.set_seed(recipe.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base_folder, num_labels=len(splits.classes), dtype=torch.float32
    )
    whole: tuple[str, ...] = ()
    if recipe.adapter is not None:
        whole = _new_modules(model, base_folder)
        inject(model, recipe.adapter, trained_whole=whole)
    trainer = KeepingTrainer(
        recipe,
        whole,
        model=model,
        args=_arguments(recipe, run_folder),
        train_dataset=splits.train,
        eval_dataset=splits.held_out,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer if recipe.adapter is None else None,
        compute_metrics=_accuracy,
        callbacks=[KeepSteps(recipe.kept_steps)],
    )
    trainer.remove_callback(transformers.PrinterCallback)  # our progress bar shows the loss
    return trainer


def _arguments(recipe: Recipe, run_folder: Path) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(run_folder),
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=64,
        gradient_accumulation_steps=recipe.accumulation,
        weight_decay=recipe.weight_decay,
        lr_scheduler_type=_SCHEDULES[recipe.schedule],
        warmup_steps=recipe.warmup_steps,
        bf16=recipe.precision == "bfloat16",
        fp16=recipe.precision == "float16",
        use_cpu=not torch.accelerator.is_available(),
        seed=recipe.seed,
        save_strategy="no",  # the callback asks for checkpoints
        logging_steps=max(1, min(10, recipe.steps // 10)),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )


def _new_modules(model: Any, base_folder: Path) -> tuple[str, ...]:
    """Name the modules directly under the model that the pre-trained one does not have: its head.

    They start at random, so an adapter alone could not carry what they learn.
    """
    stored = {name.partition(".")[0] for name in open_base(base_folder).tensors}
    known = {model.base_model_prefix, *stored}
    return tuple(
        name
        for name, child in model.named_children()
        if name not in known and next(child.parameters(), None) is not None
    )


def _accuracy(prediction: Any) -> dict[str, float]:
    right = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    return {"accuracy": float(right.mean())}


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
                file.unlink()
