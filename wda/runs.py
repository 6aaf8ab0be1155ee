"""A run's checkpoints, found on disk and opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import yaml

from wda.checkpoints import LAYOUTS, Checkpoint, open_checkpoint, step_in
from wda.errors import CheckpointError, LocationError, listing
from wda.locations import locate
from wda.manifest import Run
from wda.places import Place
from wda.remote import RemotePlace, at_once

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Member:
    """One opened checkpoint of a run.

    Attributes
    ----------
    run, method : str
        Name of the run, and how it was trained.
    seed, step : int or None
        The run's seed and the checkpoint's training step, where known.
    checkpoint : Checkpoint
        What was found on disk.
    """

    run: str
    method: str
    seed: int | None
    step: int | None
    checkpoint: Checkpoint


@dataclass(frozen=True)
class _Found:
    """One checkpoint of a run, not yet opened."""

    run: Run
    seed: int | None
    folder: Place


def open_runs(
    runs: Sequence[Run],
    on_found: Callable[[int], None] = lambda _total: None,
    on_opened: Callable[[], None] = lambda: None,
) -> list[Member]:
    """Open the checkpoints of runs, those of each run in the order of their steps.

    Parameters
    ----------
    runs : sequence of Run
        What to open; what lies elsewhere is asked for side by side.
    on_found : callable, optional
        Called once, with how many checkpoints there are.
    on_opened : callable, optional
        Called after each, also from other threads.

    Returns
    -------
    list of Member
        One per checkpoint, in the order of the runs.

    Raises
    ------
    LocationError
        When a folder does not exist.
    CheckpointError
        When a checkpoint cannot be read, or steps the manifest names are not there.
    """
    found = [one for run in at_once(_find, runs) for one in run]
    on_found(len(found))

    def open_one(one: _Found) -> Member:
        checkpoint = open_checkpoint(one.folder, one.run.given)
        on_opened()
        method = one.run.method or checkpoint.method
        return Member(one.run.name, method, one.seed, checkpoint.step, checkpoint)

    far = any(isinstance(one.folder, RemotePlace) for one in found)
    return at_once(open_one, found) if far else list(map(open_one, found))


def _find(run: Run) -> list[_Found]:
    """Find the checkpoints of a run."""
    try:
        folder = locate(run.path)
    except LocationError as error:
        raise LocationError(f"run {run.name!r}: {error}") from None
    seed = run.seed if run.seed is not None else _recorded_seed(folder)
    return [_Found(run, seed, step) for step in step_folders(folder, run)]


def step_folders(folder: Place, run: Run) -> list[Place]:
    """Give the ``checkpoint-<step>`` folders a run uses, or the folder itself if it has none.

    Files of steps, as ``epoch=1-step=200.ckpt`` of Lightning, count as such folders.

    A model saved beside such folders is left alone: a trainer saves its last checkpoint there once
    more. Where a folder cannot be listed, the steps that the manifest names are taken at its word.
    """
    if isinstance(folder, RemotePlace) and not folder.listable and run.steps:
        return [folder / f"checkpoint-{step}" for step in sorted(run.steps)]
    children = folder.iterdir() if folder.is_dir() else ()
    by_step = {step: f for f in children if (step := step_in(f.name, *LAYOUTS)) is not None}
    if not by_step:
        return [folder]
    absent = sorted(set(run.steps or ()) - set(by_step))
    if absent:
        raise CheckpointError(
            f"run {run.name!r}: {folder} has no checkpoint for steps {listing(absent)}; "
            f"it has {listing(sorted(by_step))}"
        )
    return [by_step[step] for step in sorted(by_step) if run.steps is None or step in run.steps]


def _recorded_seed(folder: Place) -> int | None:
    """Give the seed of the recipe that ``wda train`` saves beside a run."""
    recipe = folder / RECIPE_FILE
    if not recipe.is_file():
        return None
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    seed = content.get("seed") if isinstance(content, dict) else None
    return seed if isinstance(seed, int) else None
