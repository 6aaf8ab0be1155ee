"""The whole path of a sweep: train, compare, tabulate, draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wda.comparison import compare
from wda.figures import save
from wda.files import staged_folder
from wda.manifest import Manifest, Run
from wda.sweeps.figures import sweep_figures
from wda.sweeps.grid import Sweep
from wda.sweeps.running import Done, run_all
from wda.sweeps.table import SWEEP_FILE, sweep_table
from wda.table import write_table
from wda.training.packing import BASE_FOLDER


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep came to.

    Attributes
    ----------
    table : pandas.DataFrame
        One row per run; columns in :data:`wda.sweeps.table.COLUMNS`, and the varied fields.
    written : tuple of str
        The files.
    """

    table: pd.DataFrame
    written: tuple[str, ...]


def run_sweep(
    sweep: Sweep,
    out: Path,
    runs: Path,
    scheduler: str | None = None,
    progress: bool = True,
) -> SweepOutcome:
    """Train all runs of a sweep, compare their checkpoints, write table and figures.

    Parameters
    ----------
    sweep : Sweep
        The runs.
    out : Path
        Where tables and figures go.
    runs : Path
        Where the runs lie. Sweeps that share it share the runs that they have in common.
    scheduler : str, optional
        A Dask scheduler whose workers train, as for a comparison.
    progress : bool
        Whether to show progress on standard error.

    Returns
    -------
    SweepOutcome
        Failed runs have a row too.

    Raises
    ------
    OutputError
        When a folder cannot be written to.
    """
    with staged_folder(out) as scratch:
        done = run_all(sweep.runs, runs, scheduler, progress)
        moved = [
            compare(manifest, progress=progress) for manifest in _manifests(done, sweep.matrices)
        ]
        compared = pd.concat([c.table for c in moved]) if moved else pd.DataFrame()
        statistics = pd.concat([c.statistics for c in moved]) if moved else _NO_STATISTICS
        table = sweep_table(sweep, done, compared, statistics)
        table.to_csv(scratch / SWEEP_FILE, index=False)
        if moved:
            write_table(compared, scratch)
            statistics.to_csv(scratch / "statistics.csv", index=False)
        for name, figure in sweep_figures(table, tuple(sweep.varied), compared):
            save(figure, scratch, name)
        written = tuple(sorted(file.name for file in scratch.iterdir()))
    return SweepOutcome(table, written)


_NO_STATISTICS = pd.DataFrame({"run": [], "matrix": [], "pearson_r": []})


def _manifests(done: Sequence[Done], matrices: Sequence[str]) -> list[Manifest]:
    """Name what is compared: one comparison for all runs of one base."""
    of_base: dict[str, list[Run]] = {}
    for one in done:
        recipe = one.planned.recipe
        if one.result is None or (recipe.adapter and not recipe.adapter.changes_weights):
            continue
        base = str(one.folder / BASE_FOLDER) if recipe.quantised else recipe.base
        run = Run(path=str(one.folder), name=one.planned.name, seed=recipe.seed)
        of_base.setdefault(base, []).append(run)
    return [Manifest(base=b, runs=r, matrices=list(matrices)) for b, r in of_base.items()]
