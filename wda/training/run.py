"""One training, from a recipe to a folder of checkpoints."""

from __future__ import annotations

import importlib
import json
import os
import time
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError
from rich.progress import Progress

from wda.adapters.packed import hush_bitsandbytes
from wda.checkpoints import open_base
from wda.errors import MissingExtraError, OutputError
from wda.files import clear_scratch, describe, is_scratch, write_text
from wda.locations import resolve
from wda.progress import progress_bar
from wda.provenance import provenance
from wda.runs import RECIPE_FILE
from wda.training.recipe import Recipe

RESULT_FILE = "result.json"


class TrainingResult(BaseModel):
    """What a finished training came to.

    Attributes
    ----------
    accuracy : float
        Share of the held-out texts that are classified right, of the questions whose written answer
        is, or of the answers' tokens that are the likeliest ones, 0 to 1.
    accuracy_of : str
        What it is a share of.
    loss : float
        Mean cross-entropy on them.
    n_held_out : int
        How many rows are held out.
    steps : int
        Optimiser steps.
    trainable, parameters : int
        Trained and all parameters of the model.
    seconds : float
        Wall time of the training, this process alone.
    peak_memory : int
        Bytes: the most that the accelerator's memory held while it trained; without one, the most
        resident memory of the process.
    """

    accuracy: float
    accuracy_of: str
    loss: float
    n_held_out: int
    steps: int
    trainable: int
    parameters: int
    seconds: float
    peak_memory: int


def train_recipe(
    recipe: Recipe, run_folder: Path, resume: bool = False, progress: bool | Progress = True
) -> TrainingResult:
    """Train by a recipe and keep its checkpoints.

    Parameters
    ----------
    recipe : Recipe
        What to train, and how.
    run_folder : Path
        Where checkpoints, recipe, result and provenance go.
    resume : bool
        Go on from the newest checkpoint of an interrupted training of the same recipe.
    progress : bool or Progress
        Whether to show a progress bar on standard error, or the one to add to.

    Returns
    -------
    TrainingResult
        Also written to ``result.json`` when everything else is there.

    Raises
    ------
    OutputError
        When the folder holds a run already and ``resume`` is false, or another recipe's run.
    MissingExtraError
        When transformers or datasets is not installed.
    WdaError
        When model or data cannot be read.
    """
    hush_bitsandbytes()
    _require_training_extra()
    # transformers is slow to import.
    from wda.training.blueprint import count  # noqa: PLC0415
    from wda.training.keeping import METRICS_FILE, drop_training_state, last_checkpoint  # noqa: PLC0415
    from wda.training.machine import require_precision, require_room  # noqa: PLC0415
    from wda.training.packing import packed_base  # noqa: PLC0415
    from wda.training.peak import PeakMemory  # noqa: PLC0415
    from wda.training.tasks import task_of  # noqa: PLC0415
    from wda.training.trainer import make_trainer  # noqa: PLC0415
    from wda.training.watching import ShowProgress  # noqa: PLC0415

    first = is_first_process()
    if resume and (result := finished_result(recipe, run_folder)):
        if first:
            drop_training_state(run_folder)
        return result
    task_of(recipe)  # refuses models that are counted only
    require_precision(recipe.precision)
    base = resolve(recipe.base)
    if first:
        _prepare(recipe, run_folder, resume)
        _record_inputs(recipe, base, run_folder)
    if recipe.quantised:
        base = packed_base(recipe, base, run_folder)
    with progress_bar(progress if first else False) as bar:
        trainer = make_trainer(recipe, base, run_folder)
        steps = trainer.args.max_steps
        counted = count(trainer.model)
        if first:
            require_room(run_folder, 4 * counted.trainable, len(recipe.kept_steps(steps)))
        trainer.add_callback(ShowProgress(bar, run_folder.name, steps))
        last = last_checkpoint(run_folder) if resume else None
        if last is None:
            trainer.score_start()
        start = time.perf_counter()
        with PeakMemory() as memory:
            if (
                last is None or last.name != f"checkpoint-{steps}"
            ):  # else only the result is wanting
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        seconds = time.perf_counter() - start
    scores = json.loads((run_folder / f"checkpoint-{steps}" / METRICS_FILE).read_text())
    result = TrainingResult(
        accuracy=scores.get("exact_match", scores["accuracy"]),
        accuracy_of="questions" if "exact_match" in scores else trainer.task.accuracy_of,
        loss=scores["loss"],
        n_held_out=len(trainer.eval_dataset),
        steps=steps,
        trainable=counted.trainable,
        parameters=counted.parameters,
        seconds=seconds,
        peak_memory=memory.peak,
    )
    if first:
        write_text(run_folder / RESULT_FILE, result.model_dump_json(indent=2) + "\n")
        drop_training_state(run_folder)
    return result


def is_first_process() -> bool:
    """Tell whether this process writes for all that torchrun started, or is alone."""
    return int(os.environ.get("RANK", "0")) == 0


def _record_inputs(recipe: Recipe, base: Path, run_folder: Path) -> None:
    from wda.training.rows import fingerprinted  # noqa: PLC0415 - datasets is slow to import

    facts = {
        "seed": recipe.seed,
        "base": {"location": recipe.base, "files": describe(open_base(base).files)},
        "data": {
            "location": recipe.data.location,
            "files": describe(fingerprinted(recipe.data)),
        },
    }
    write_text(run_folder / "provenance.json", json.dumps(provenance(**facts), indent=2) + "\n")


def finished_result(recipe: Recipe, run_folder: Path) -> TrainingResult | None:
    """Give the result of a run that this very recipe has finished, if there is one."""
    if not _same_recipe(recipe, run_folder) or not (run_folder / RESULT_FILE).is_file():
        return None
    try:
        result = TrainingResult.model_validate_json((run_folder / RESULT_FILE).read_text())
    except ValidationError:
        return None
    kept = [run_folder / f"checkpoint-{step}" for step in recipe.kept_steps(result.steps)]
    return result if all(folder.is_dir() for folder in kept) else None


def require_own_folder(recipe: Recipe, run_folder: Path, resume: bool) -> None:
    """Make sure that a folder is empty, or holds the run that is to be resumed.

    Raises
    ------
    OutputError
        When it holds something else.
    """
    if not (run_folder / RECIPE_FILE).is_file():
        if run_folder.is_dir() and not all(map(is_scratch, run_folder.iterdir())):
            raise OutputError(
                f"{run_folder}: is not empty and no run of wda; choose another folder"
            )
    elif not resume:
        raise OutputError(
            f"{run_folder}: holds a run already; continue it with --resume, or choose another"
        )
    elif not _same_recipe(recipe, run_folder):
        raise OutputError(
            f"{run_folder}: was started with another recipe, see its {RECIPE_FILE}; resume with "
            "that one, choose another folder, or take this one away"
        )


def _prepare(recipe: Recipe, run_folder: Path, resume: bool) -> None:
    """Make the run's folder and put the recipe into it, or make sure it is the one to resume."""
    require_own_folder(recipe, run_folder, resume)
    if not (run_folder / RECIPE_FILE).is_file():
        write_text(run_folder / RECIPE_FILE, recipe.to_yaml())
    clear_scratch(run_folder)


def _same_recipe(recipe: Recipe, run_folder: Path) -> bool:
    try:
        content = yaml.safe_load((run_folder / RECIPE_FILE).read_text(encoding="utf-8"))
        return Recipe.model_validate(content) == recipe
    except (OSError, yaml.YAMLError, ValidationError):
        return False


def _require_training_extra() -> None:
    for name in ("transformers", "datasets", "accelerate"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise MissingExtraError(
                f"training needs {name}, which is not installed; "
                "try: pip install 'weight-decomposition-analysis[train]'"
            ) from None
