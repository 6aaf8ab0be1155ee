"""A recipe → a trainer with model, data and adapter."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from wda.adapters import inject, with_prefix
from wda.errors import ManifestError
from wda.training.keeping import KeepingTrainer
from wda.training.recipe import Recipe
from wda.training.tasks import Splits, Task, task_of
from wda.training.tasks.task import load_pretrained
from wda.training.trained_whole import modules_called
from wda.training.watching import KeepSteps, StopWhenLost

# Recipe's word → transformers' name of the schedule that honours a warm-up.
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def make_trainer(recipe: Recipe, base: Path, run_folder: Path) -> KeepingTrainer:
    """Load model and data, inject the adapter if there is one, and make the trainer.

    Parameters
    ----------
    recipe : Recipe
        What is trained.
    base, run_folder : Path
        The pre-trained model, and where checkpoints go.

    Returns
    -------
    KeepingTrainer
        Ready to train; silent but for errors.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)

    task = task_of(recipe)
    tokenizer = load_pretrained(transformers.AutoTokenizer, base)
    splits = task.splits(tokenizer)
    transformers.set_seed(recipe.seed)
    model = task.model(base, splits.classes)
    if recipe.quantised:
        model._hf_peft_config_loaded = True  # it asks for peft's adapters, and ours do as well
    whole: tuple[str, ...] = ()
    if recipe.adapter is not None:
        whole = (*task.new_modules(model, base), *modules_called(model, recipe.trained_whole))
        if recipe.method == "prefix":
            model = with_prefix(model, recipe.adapter, task.peft_type, whole)
        else:
            inject(model, recipe.adapter, trained_whole=whole)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    _require_positions(recipe, splits, model)
    steps = recipe.all_steps(len(splits.train), int(os.environ.get("WORLD_SIZE", "1")))
    trainer = KeepingTrainer(
        recipe,
        task,
        whole,
        str(base.resolve()) if recipe.quantised else recipe.base,
        lambda: task.answer(model, tokenizer, splits.questions),
        model=model,
        args=_arguments(recipe, task, steps, run_folder),
        train_dataset=splits.train,
        eval_dataset=_by_length(splits.held_out),
        data_collator=task.collator(tokenizer, model),
        processing_class=tokenizer if recipe.adapter is None else None,
        compute_metrics=task.scores,
        preprocess_logits_for_metrics=task.reduce,
        callbacks=[KeepSteps(recipe.kept_steps(steps))],
    )
    trainer.add_callback(StopWhenLost(trainer))
    trainer.remove_callback(transformers.PrinterCallback)  # our progress bar shows the loss
    return trainer


def _require_positions(recipe: Recipe, splits: Splits, model: Any) -> None:
    """Refuse rows that are longer than the model has positions for."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most is None:
        return
    if recipe.adapter is not None and recipe.method == "prefix":
        most -= recipe.adapter.virtual_tokens
    longest = max(len(tokens) for part in splits.parts for tokens in part["input_ids"])
    if longest > most:
        raise ManifestError(
            f"max_length: a row has {longest} tokens and {recipe.base} has places for {most}; "
            f"set max_length: {most} or less"
        )


def _by_length(rows: datasets.Dataset) -> datasets.Dataset:
    """Put rows of like length together, which saves padding where the order means nothing."""
    lengths = [len(tokens) for tokens in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__))


def _arguments(
    recipe: Recipe, task: Task, steps: int, run_folder: Path
) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(run_folder),
        max_steps=steps,
        learning_rate=recipe.rate,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=task.eval_batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        weight_decay=recipe.weight_decay,
        lr_scheduler_type=_SCHEDULES[recipe.schedule],
        warmup_steps=recipe.warmup_steps(steps),
        bf16=recipe.precision == "bfloat16",
        fp16=recipe.precision == "float16",
        use_cpu=not torch.accelerator.is_available(),
        seed=recipe.seed,
        save_strategy="no",  # the callback asks for checkpoints
        logging_steps=max(1, min(10, steps // 10)),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
