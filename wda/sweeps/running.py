"""The runs of a sweep, one after another here or side by side on a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from wda.cluster import executor_of
from wda.errors import WdaError
from wda.progress import columns
from wda.runs import RECIPE_FILE
from wda.sweeps.grid import Planned
from wda.training import Recipe, TrainingResult, train_recipe

# More lines than this of the table are left out, so that it fits a screen.
_MOST_SHOWN = 16


@dataclass(frozen=True)
class Done:
    """What became of a run.

    Attributes
    ----------
    planned : Planned
        The run.
    folder : Path
        Where it lies.
    result : TrainingResult or None
        None when it failed.
    error : str
        Why it failed.
    """

    planned: Planned
    folder: Path
    result: TrainingResult | None
    error: str = ""


def run_all(
    runs: Sequence[Planned], folder: Path, scheduler: str | None, progress: bool
) -> list[Done]:
    """Train what is not trained yet; what fails is noted, and the rest goes on.

    Parameters
    ----------
    runs : sequence of Planned
        What to train.
    folder : Path
        Holds a folder for each run. A run of the same recipe is found whatever it is called.
    scheduler : str or None
        A Dask scheduler whose workers train; by default this process does.
    progress : bool
        Whether to show a table of the runs and a progress bar on standard error.

    Returns
    -------
    list of Done
        One for each run, in their order.
    """
    folders = place(runs, folder)
    done: dict[str, Done] = {}
    with SweepProgress(runs, progress) as shown:
        work = [(planned, folders[planned.name]) for planned in runs]
        for one in _elsewhere(work, scheduler, shown) if scheduler else _here(work, shown):
            done[one.planned.name] = one
            shown.finish(one)
    return [done[planned.name] for planned in runs]


def place(runs: Sequence[Planned], folder: Path) -> dict[str, Path]:
    """Give each run its folder: the one that holds its recipe already, or a new one."""
    there = {} if not folder.is_dir() else {f: _recipe_in(f) for f in sorted(folder.iterdir())}
    places: dict[str, Path] = {}
    for planned in runs:
        same = [f for f, recipe in there.items() if recipe == planned.recipe]
        places[planned.name] = same[0] if same else _free(folder, planned.name, {*there})
    return places


def _free(folder: Path, name: str, taken: set[Path]) -> Path:
    names = (folder / (name if i == 1 else f"{name}_{i}") for i in range(1, len(taken) + 2))
    return next(path for path in names if path not in taken)


def _recipe_in(folder: Path) -> Recipe | None:
    try:
        content = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
        return Recipe.model_validate(content)
    except (OSError, yaml.YAMLError, ValidationError):
        return None


def _here(work: Sequence[tuple[Planned, Path]], shown: SweepProgress) -> Iterator[Done]:
    for planned, folder in work:
        shown.begin(planned)
        yield _train(planned, folder, shown if shown.live.is_started else False)


def _elsewhere(
    work: Sequence[tuple[Planned, Path]], scheduler: str, shown: SweepProgress
) -> Iterator[Done]:
    with executor_of(scheduler) as executor:
        futures = [executor.submit(_train, *item) for item in work]
        for planned, _ in work:
            shown.begin(planned)
        for future in as_completed(futures):
            yield future.result()


def _train(planned: Planned, folder: Path, progress: bool | Progress = False) -> Done:
    try:
        return Done(planned, folder, train_recipe(planned.recipe, folder, True, progress))
    except WdaError as error:
        return Done(planned, folder, None, " ".join(str(error).split()))
    except Exception as error:  # one run's defect, or its lack of memory, is not the others'
        what = (str(error).strip().splitlines() or ["no message"])[0]
        return Done(planned, folder, None, f"{type(error).__name__}: {what}")


class SweepProgress(Progress):
    """A table of the runs above the progress bars of those that train."""

    def __init__(self, runs: Sequence[Planned], show: bool) -> None:
        # Progress asks for what is shown as soon as it is made.
        self._states = {planned.name: ("waiting", "", "") for planned in runs}
        super().__init__(*columns(), console=Console(stderr=True), disable=not show)
        self._all = self.add_task("all runs", total=len(runs), note="")

    def begin(self, planned: Planned) -> None:
        """Say that a run trains."""
        self._states[planned.name] = ("training", "", "")

    def finish(self, done: Done) -> None:
        """Say what a run came to, and take its bars away."""
        result = done.result
        told = (f"{result.accuracy:.3f}", f"{result.seconds:.0f} s") if result else (done.error, "")
        self._states[done.planned.name] = ("done" if result else "[red]failed[/]", *told)
        for task in self.task_ids:
            if task != self._all:
                self.remove_task(task)
        self.advance(self._all)

    def get_renderables(self) -> Iterator[RenderableType]:
        """Give the table, then the bars."""
        yield Group(self._table(), self.make_tasks_table(self.tasks))

    def _table(self) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("run", "", "accuracy", "time"):
            table.add_column(column, overflow="ellipsis", no_wrap=True)
        rows = list(self._states.items())
        # Around the first that is not done, so that what happens is seen.
        now = next((i for i, (_, s) in enumerate(rows) if s[0] in ("waiting", "training")), 0)
        first = max(0, min(now - _MOST_SHOWN // 2, len(rows) - _MOST_SHOWN))
        for name, (state, *told) in rows[first : first + _MOST_SHOWN]:
            table.add_row(escape(name), state, *map(escape, told))
        return table
