"""What a recipe would do, found out before anything is downloaded or trained."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import datasets
import transformers

from wda.errors import ManifestError, WdaError
from wda.locations import locate
from wda.remote import RemotePlace
from wda.training.blueprint import blueprint
from wda.training.estimate import Estimate, estimate, matmul_rate
from wda.training.machine import free_room, require_precision, room_needed
from wda.training.recipe import Recipe
from wda.training.rows import columns_elsewhere, is_elsewhere, require_columns
from wda.training.run import require_own_folder
from wda.training.tasks import Task, task_of
from wda.training.tasks.task import load_pretrained

Found = TypeVar("Found")


@dataclass(frozen=True)
class DryRun:
    """What a recipe would do.

    Attributes
    ----------
    method : str
        What is trained.
    estimate : Estimate
        Parameters, memory, arithmetic.
    rows, held_out : int or None
        How many there are to train on and to test on; None where the data are elsewhere.
    length : int or None
        Mean tokens of a row, where the tokenizer is on this machine.
    steps : int or None
        Optimiser steps; None where they depend on data elsewhere.
    kept : int
        Checkpoints.
    disk, free : int
        Bytes that the run's folder takes at most, and that are free there.
    seconds_per_step : float
        At the rate of this machine's matrix products, which trainings do not reach.
    notes : tuple of str
        What could not be looked at, and why; what this machine lacks.
    """

    method: str
    estimate: Estimate
    rows: int | None
    held_out: int | None
    length: int | None
    steps: int | None
    kept: int
    disk: int
    free: int
    seconds_per_step: float
    notes: tuple[str, ...]


def dry_run(recipe: Recipe, run_folder: Path, resume: bool = False) -> DryRun:
    """Check a recipe and estimate what it takes, without weights and without training.

    Parameters
    ----------
    recipe : Recipe
        What would be trained.
    run_folder : Path
        Where the run would go.
    resume : bool
        Whether it may lie there already.

    Returns
    -------
    DryRun
        What is known.

    Raises
    ------
    ManifestError
        With every problem that was found.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every new try
    problems: list[str] = []
    notes: list[str] = []

    # The machine that trains may be another one, so this is no problem of the recipe's.
    _try(lambda: require_precision(recipe.precision), notes)
    _try(lambda: require_own_folder(recipe, run_folder, resume), problems)
    data = _try(lambda: _look_at_data(recipe, notes), problems)
    length = None if data is None else data.length
    taken = _try(lambda: estimate(recipe, blueprint(recipe), length), problems)
    if taken is None or data is None or problems:
        raise ManifestError(f"{len(problems)} wrong: " + "; ".join(problems), problems)
    known = data.rows if data.rows is not None else recipe.data.samples
    steps = recipe.steps if known is None else recipe.all_steps(known)
    kept = len({*recipe.keep, "the last"}) if steps is None else len(recipe.kept_steps(steps))
    return DryRun(
        method=recipe.method,
        estimate=taken,
        rows=data.rows,
        held_out=data.held_out,
        length=length,
        steps=steps,
        kept=kept,
        disk=room_needed(taken.checkpoint, kept),
        free=free_room(run_folder),
        seconds_per_step=taken.flop / matmul_rate(recipe.precision),
        notes=tuple(notes),
    )


def _try(check: Callable[[], Found], told: list[str]) -> Found | None:
    try:
        return check()
    except WdaError as problem:
        told.append(" ".join(str(problem).split()))
        return None


@dataclass(frozen=True)
class _Data:
    """Rows to train on, rows held out, mean tokens of a row; None where they are not known."""

    rows: int | None = None
    held_out: int | None = None
    length: int | None = None


def _look_at_data(recipe: Recipe, notes: list[str]) -> _Data:
    """Read the data that are here, of those elsewhere the columns alone."""
    task, source = task_of(recipe), recipe.data
    if not is_elsewhere(source):
        train, held_out = task.rows()
        return _Data(len(train), len(held_out), _mean_length(task, train, held_out))
    try:
        there = columns_elsewhere(source)
    except WdaError as problem:
        notes.append(f"not looked at: {' '.join(str(problem).split())}")
    else:
        require_columns(there, [*task.columns, *source.where], source.location)
        notes.append(f"{source.location}: its columns fit; its rows were not fetched")
    return _Data()


def _mean_length(task: Task, train: datasets.Dataset, held_out: datasets.Dataset) -> int | None:
    base = locate(task.recipe.base)
    if isinstance(base, RemotePlace):
        return None
    tokenizer = load_pretrained(transformers.AutoTokenizer, Path(str(base)))
    lengths = [len(tokens) for tokens in task.encode(train, held_out, tokenizer).train["input_ids"]]
    return max(1, round(sum(lengths) / len(lengths)))
