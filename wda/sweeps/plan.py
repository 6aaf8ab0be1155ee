"""What a sweep would take, found out before any of its runs is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wda.errors import ManifestError, WdaError, listing
from wda.naming import find_matrices, select
from wda.progress import duration, progress_bar
from wda.sweeps.grid import Planned, Sweep
from wda.sweeps.running import place
from wda.training import Recipe, finished_result
from wda.training.blueprint import blueprint
from wda.training.dry_run import dry_run

# More than these have to be confirmed.
MOST_RUNS, MOST_SECONDS = 24, 2 * 3600.0


@dataclass(frozen=True)
class SweepPlan:
    """What is left to do of a sweep.

    Attributes
    ----------
    runs, finished : int
        All runs, and those that are finished already.
    seconds : float
        What the others take one after another, at the rate of this machine's matrix products,
        which trainings do not reach.
    unknown : int
        Runs whose length depends on data that are elsewhere; they are not in ``seconds``.
    """

    runs: int
    finished: int
    seconds: float
    unknown: int

    @property
    def left(self) -> int:
        """Runs to train."""
        return self.runs - self.finished

    @property
    def words(self) -> str:
        """All of it in a line."""
        done = f", {self.finished} of them finished" if self.finished else ""
        if not self.left:
            return f"{self.runs} runs{done}"
        without = f", {self.unknown} runs not counted" if self.unknown else ""
        return f"{self.runs} runs{done}; {duration(self.seconds)} at least{without}"

    def require_few(self) -> None:
        """Refuse a grid that is large, until it is confirmed.

        Raises
        ------
        ManifestError
            With the number of runs and hours.
        """
        if self.left > MOST_RUNS or self.seconds > MOST_SECONDS:
            raise ManifestError(
                f"grid: {self.left} runs of {duration(self.seconds)} in all at least are more than "
                f"{MOST_RUNS} runs or {duration(MOST_SECONDS)}; confirm with --yes, or shorten the "
                "grid"
            )


def plan_sweep(sweep: Sweep, folder: Path, progress: bool = True) -> SweepPlan:
    """Check every recipe of a sweep, and tell what training them takes.

    Parameters
    ----------
    sweep : Sweep
        The runs.
    folder : Path
        Where they lie, or will.
    progress : bool
        Whether to show a progress bar on standard error.

    Returns
    -------
    SweepPlan
        What is left.

    Raises
    ------
    ManifestError
        With every problem of every recipe.
    """
    folders = place(sweep.runs, folder)
    left = [p for p in sweep.runs if finished_result(p.recipe, folders[p.name]) is None]
    seconds: dict[str, float | None] = {}
    wrong: dict[str, list[str]] = {}
    with progress_bar(progress) as bar:
        for base, planned in {p.recipe.base: p for p in left}.items():
            try:
                _require_matrices(planned.recipe, sweep.matrices)
            except WdaError as unfit:
                wrong.setdefault(str(unfit), []).append(base)
        task = bar.add_task("checking", total=len(left), note="")
        for planned in left:
            alike = _kind(planned.recipe)
            if alike not in seconds:
                try:
                    seconds[alike] = _seconds(planned, folders[planned.name])
                except ManifestError as found:
                    seconds[alike] = None
                    for problem in found.problems:
                        wrong.setdefault(problem, []).append(planned.name)
            bar.advance(task)
    if wrong:
        told = [f"{listing(names, 2)}: {problem}" for problem, names in wrong.items()]
        raise ManifestError(f"grid: {len(told)} wrong: {'; '.join(told)}", told)
    taken = [seconds[_kind(planned.recipe)] for planned in left]
    known = [s for s in taken if s is not None]
    finished = len(sweep.runs) - len(left)
    return SweepPlan(len(sweep.runs), finished, sum(known), len(taken) - len(known))


def _require_matrices(recipe: Recipe, matrices: Sequence[str]) -> None:
    """Make sure that there will be something to compare."""
    plain = recipe.model_copy(update={"adapter": None, "quantised": None, "trained_whole": []})
    shapes = {n: tuple(p.shape) for n, p in blueprint(plain).named_parameters()}
    select(find_matrices(shapes), matrices)


def _kind(recipe: Recipe) -> str:
    """Give what recipes have in common that take as long, so that each kind is looked at once."""
    return recipe.model_copy(update={"seed": 0, "learning_rate": 1.0}).to_yaml()


def _seconds(planned: Planned, folder: Path) -> float | None:
    found = dry_run(planned.recipe, folder, resume=True)
    return None if found.steps is None else found.steps * found.seconds_per_step
