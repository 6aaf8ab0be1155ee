"""The demonstration: a small real model, trained three ways, compared and set beside the paper."""

from __future__ import annotations

import importlib.resources
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wda.comparison import compare
from wda.errors import SelectionError, listing
from wda.files import staged_folder
from wda.manifest import make_manifest
from wda.report import check_installed
from wda.reporting import report
from wda.runs import RECIPE_FILE
from wda.style import METHOD_NAMES
from wda.training import Recipe, TrainingResult, load_recipe, train_recipe

# Correlation of ΔM and ΔD over the query matrices: arXiv 2402.09353, Sec. 4.1, on VL-BART.
PAPER_R = {"ft": -0.62, "lora": 0.83, "dora": -0.31}


@dataclass(frozen=True)
class DemoOutcome:
    """What the demonstration prints.

    Attributes
    ----------
    statistics : pandas.DataFrame
        The comparison's fits, with the paper's correlation beside those of the query matrices.
    reading : list of str
        What was trained, and where the result differs from the paper.
    """

    statistics: pd.DataFrame
    reading: list[str]


def run_demo(
    methods: Sequence[str],
    steps: int | None,
    seed: int | None,
    fresh: bool,
    runs: Path,
    out: Path,
    progress: bool,
) -> DemoOutcome:
    """Train what is not trained yet, compare all of it, write the results.

    Parameters
    ----------
    methods : sequence of str
        Which of the recipes ``ft``, ``lora``, ``dora``.
    steps, seed : int or None
        Other than the recipes' own; such runs lie in a folder of their own.
    fresh : bool
        Train anew even what is finished.
    runs, out : Path
        Where the runs lie, and where figure and tables go.
    progress : bool
        Whether to show progress bars.

    Returns
    -------
    DemoOutcome
        For the terminal.

    Raises
    ------
    SelectionError
        When a method is none of the demonstration's.
    WdaError
        When model or data are not installed, or a folder cannot be written to.
    """
    if not methods:
        raise SelectionError("--methods: name at least one, such as lora")
    recipes = {method: _recipe(method, steps, seed) for method in dict.fromkeys(methods)}
    folder = _run_folder(runs, steps, seed)
    check_installed()
    # The output folder is opened first, so that one that cannot be written to fails at once.
    with staged_folder(out) as scratch:
        results = {
            method: _train(recipe, folder / method, fresh, progress)
            for method, recipe in recipes.items()
        }
        base = next(iter(recipes.values())).base
        folders = [folder / method for method in recipes]
        comparison = compare(folders, base, vectors=True, progress=progress)
        comparison.write(scratch)
        report(comparison, scratch / "report.html", make_manifest(folders).runs, progress)
    statistics = comparison.statistics
    reading = [_training_line(method, recipes[method], results[method]) for method in recipes]
    reading += [_paper_line(method, statistics) for method in recipes]
    return DemoOutcome(_beside_paper(statistics), [*reading, _CAVEAT])


def _recipe(method: str, steps: int | None, seed: int | None) -> Recipe:
    folder = importlib.resources.files("wda") / "recipes" / "demo"
    known = sorted(item.name.removesuffix(".yaml") for item in folder.iterdir())
    if method not in known:
        raise SelectionError(f"--methods: {method!r} is none of {listing(known)}")
    with importlib.resources.as_file(folder / f"{method}.yaml") as file:
        recipe = load_recipe(file)
    recipe = recipe if steps is None else recipe.with_steps(steps)
    return recipe if seed is None else recipe.model_copy(update={"seed": seed})


def _run_folder(runs: Path, steps: int | None, seed: int | None) -> Path:
    """Keep runs of other lengths or seeds apart from the standard ones."""
    parts = [f"steps-{steps}"] if steps is not None else []
    parts += [f"seed-{seed}"] if seed is not None else []
    return runs / "-".join(parts) if parts else runs


def _train(recipe: Recipe, folder: Path, fresh: bool, progress: bool) -> TrainingResult:
    """Train a run, continue it, or take it as it is when it is finished."""
    if fresh and (folder / RECIPE_FILE).is_file():
        shutil.rmtree(folder)
    return train_recipe(recipe, folder, resume=True, progress=progress)


def _beside_paper(statistics: pd.DataFrame) -> pd.DataFrame:
    """Put the paper's correlation beside ours, where it gives one: for the query matrices."""
    is_query = statistics["matrix"] == "query"
    return statistics.assign(
        paper_r=statistics["method"].map(PAPER_R).astype(float).where(is_query)
    )


def _training_line(method: str, recipe: Recipe, result: TrainingResult) -> str:
    name, kept = METHOD_NAMES[method], ", ".join(map(str, recipe.kept_steps(result.steps)))
    return (
        f"{name}: learning rate {recipe.rate:g}, seed {recipe.seed}, checkpoints at steps "
        f"{kept}; held-out accuracy {result.accuracy:.3f} on {result.n_held_out} sentences; "
        f"{result.trainable:,} of {result.parameters:,} parameters trained"
    )


def _paper_line(method: str, statistics: pd.DataFrame) -> str:
    of_query = statistics[(statistics["method"] == method) & (statistics["matrix"] == "query")]
    here, paper = float(of_query["pearson_r"].iloc[0]), PAPER_R[method]
    verdict = "the signs agree" if here * paper > 0 else "the signs differ"
    if math.isnan(here):
        verdict = "too few points for an r here"
    name = METHOD_NAMES[method]
    return f"{name}, query: r = {here:+.2f} here, {paper:+.2f} in the paper: {verdict}"


_CAVEAT = (
    "The paper's r are of VL-BART on image-text tasks. It does not say which steps its three "
    "intermediate checkpoints are, and r depends on that choice."
)
