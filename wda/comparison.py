"""The whole path: checkpoints → updates → decomposition → table → statistics → figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd
from rich.progress import Progress

from wda.cache import open_cache
from wda.changes import GRANULARITIES, Granularity, Vectors
from wda.checkpoints import Given
from wda.checkpoints.given import NOTHING_GIVEN
from wda.decomposition import Per
from wda.draws import Draws, read_draws, write_draws
from wda.engine import usable_device
from wda.errors import ManifestError
from wda.files import describe, staged_folder
from wda.filling import table_rows, vectors_table
from wda.manifest import W0, Manifest, make_manifest
from wda.notes import cache_notes, doubtful_rows, headless_notes
from wda.nulls import NULLS, Null, draw
from wda.opening import Opened, open_all, provenance_of
from wda.plan import Reading, readings
from wda.progress import progress_bar
from wda.provenance import provenance
from wda.report import notebook_html
from wda.schedule import DEFAULT_MEMORY, Measurement, Work, measure
from wda.spectra import measure_spectra, read_spectra, saturation_notes, write_spectra
from wda.statistics import compare_methods, compute_statistics
from wda.table import (
    VECTORS_FILE,
    make_table,
    read_table,
    read_vectors,
    table_file,
    write_table,
)

if TYPE_CHECKING:
    from wda.figures import Material


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes
    ----------
    table : pandas.DataFrame
        One row per run, checkpoint and matrix; columns in :data:`wda.table.COLUMNS`.
    provenance : dict
        Command, versions, inputs and choices it was made with.
    notes : tuple of str
        What was left out and why.
    draws : Draws or None
        What random updates of the measured size show in the same rows.
    vectors : pandas.DataFrame or None
        One row per vector, where that was asked for.
    spectra : tuple of pandas.DataFrame or None
        Singular values, and what they come to, where that was asked for; columns in
        :data:`wda.spectra.VALUES_COLUMNS` and :data:`wda.spectra.COLUMNS`.
    leave_out_floored : bool
        Whether rows under three times their floor are left out of the fits.
    """

    table: pd.DataFrame
    provenance: dict[str, object]
    notes: tuple[str, ...] = ()
    draws: Draws | None = None
    vectors: pd.DataFrame | None = None
    spectra: tuple[pd.DataFrame, pd.DataFrame] | None = None
    leave_out_floored: bool = False

    @cached_property
    def statistics(self) -> pd.DataFrame:
        """One row per run and matrix label; columns in :data:`wda.statistics.COLUMNS`."""
        return compute_statistics(self.table, self.draws, leave_out_floored=self.leave_out_floored)

    @cached_property
    def comparisons(self) -> pd.DataFrame:
        """One row per two runs or methods, and label.

        Columns in :data:`wda.statistics.COMPARISON_COLUMNS`.
        """
        return compare_methods(self.table, leave_out_floored=self.leave_out_floored)

    @property
    def material(self) -> Material:
        """All that figures are drawn from."""
        from wda.figures import Material  # noqa: PLC0415 - drawing is slow to import

        values, summary = self.spectra or (None, None)
        return Material(self.table, self.statistics, self.draws, self.vectors, values, summary)

    def save(self, out: str | Path) -> None:
        """Write tables, scatter figure and provenance into a folder, all of them or none.

        Raises
        ------
        OutputError
            When the folder cannot be written to.
        """
        with staged_folder(Path(out)) as folder:
            self.write(folder)

    def write(self, folder: Path) -> None:
        """Write the files into an existing folder, one after another."""
        from wda import figures  # noqa: PLC0415 - drawing is slow to import

        self.write_tables(folder)
        figures.draw(self.material, ["scatter"], folder)

    def write_tables(self, folder: Path) -> None:
        """Write what is not a figure into an existing folder."""
        write_table(self.table, folder)
        if self.draws is not None:
            write_draws(self.draws, self.table, folder)
        if self.vectors is not None:
            self.vectors.to_parquet(folder / VECTORS_FILE, index=False)
        if self.spectra is not None:
            write_spectra(*self.spectra, folder)
        self.statistics.to_csv(folder / "statistics.csv", index=False)
        self.comparisons.to_csv(folder / "comparisons.csv", index=False)
        text = json.dumps(self.provenance, indent=2, ensure_ascii=False)
        (folder / "provenance.json").write_text(text + "\n", encoding="utf-8")

    def _repr_html_(self) -> str:
        """Show the fits and the scatter figure in a notebook."""
        return notebook_html(self.table, self.statistics, self.notes)


def compare(  # noqa: PLR0913 - all but the first have a default
    paths_or_manifest: str | Path | Sequence[str | Path] | Manifest,
    base: str | Path | None = None,
    matrices: str | Sequence[str] | None = None,
    per: Per | None = None,
    cache: str | Path | Literal[False] | None = None,
    *,
    executor: Executor | None = None,
    max_memory: int = DEFAULT_MEMORY,
    device: str = "cpu",
    given: Given = NOTHING_GIVEN,
    w0: W0 | None = None,
    granularity: Granularity = "vector",
    null: Null | None = "isotropic",
    vectors: bool = False,
    spectra: bool = False,
    leave_out_floored: bool = False,
    progress: bool = True,
) -> Comparison:
    """Measure how far the checkpoints of one or more runs moved from their base.

    Parameters
    ----------
    paths_or_manifest : path, sequence of paths or Manifest
        Run folders (each with ``checkpoint-<step>`` folders, or itself a checkpoint), or one
        manifest ending in ``.yaml``, or one that was made here.
    base : path or location, optional
        The pre-trained model; by default the manifest's, else what the adapters name.
    matrices : str or sequence of str, optional
        Labels such as ``"query"``, modules' last names such as ``"q_proj"``, or ``"re:PATTERN"``,
        in a sequence or with commas between; by default the manifest's, else query and value.
    per : {"output", "input"}, optional
        One vector per output feature, as in the paper and by default, or per input feature.
    cache : path or False, optional
        Folder of the results that are kept, so that none is computed twice; by default the user's
        cache folder. False for none: all is computed, and nothing kept.
    executor : concurrent.futures.Executor, optional
        Runs the work, one unit per matrix of the base or per block of its rows; by default threads
        of this process.
    max_memory : int
        Bytes that those threads may take together, beside the pages of mapped files.
    device : str
        Where to compute: ``cpu``, ``cuda`` or ``cuda:N``.
    given : Given
        What the checkpoints do not say themselves, such as α.
    w0 : {"original", "dequantized"}, optional
        What adapters trained on a quantised model are compared with: the weights they saw
        (``base`` is that model), or the original ones (``base`` is the original, and the adapters
        name the quantised model, or ``given.trained_on`` does). By default the weights of the base.
    granularity : {"vector", "head", "matrix"}
        What has a row: all vectors of a matrix, those of each attention head, or the matrix taken
        as one vector.
    null : {"isotropic", "rank"} or None
        Which random updates, as large as the measured ones, the statistics are held against: any,
        or those of the same rank. None for none.
    vectors : bool
        Whether to keep what every vector did, in ``.vectors``; it is then computed anew.
    spectra : bool
        Whether to measure singular spectra too, in ``.spectra``: a decomposition of every W0 and
        Wt, which takes far longer than all the rest.
    leave_out_floored : bool
        Whether to leave rows under three times their floor out of the fits.
    progress : bool
        Whether to show a progress bar on standard error.

    Returns
    -------
    Comparison
        With ``.table`` and ``.statistics``.

    Raises
    ------
    WdaError
        One of its kinds, when something given does not exist, cannot be read or does not fit.
    """
    computing = usable_device(device)
    _require("granularity", granularity, GRANULARITIES)
    _require("null", null, (None, *NULLS))
    manifest = make_manifest(paths_or_manifest, base, matrices, per, given, w0)
    counted = Vectors(manifest.per, granularity)
    with progress_bar(progress) as bar:
        opened = open_all(manifest, bar)
        with open_cache(cache, opened.base, counted, computing) as kept:
            task = bar.add_task("comparing", total=None, note="")
            known, left = ([], opened.pairings) if vectors else kept.split(opened.pairings)
            new = measure(
                opened.base,
                left,
                counted,
                Work(executor, max_memory, computing),
                keep_moves=vectors,
                on_part=lambda done, total, matrix: bar.update(
                    task, completed=done, total=total, note=str(matrix)
                ),
                on_matrix=kept.keep,
            )
        measurements = _in_order([*known, *new], opened)
        draws = _draws(opened, measurements, null, bar)
        found = _spectra(opened, bar) if spectra else None
    table = make_table(row for measurement in measurements for row in table_rows(measurement))
    facts = provenance_of(manifest, opened)
    facts |= {"device": computing, "rows_computed_before": _count_rows(known)}
    facts |= {"granularity": granularity, "null": null, "leave_out_floored": leave_out_floored}
    return Comparison(
        table,
        provenance(**facts),
        (
            *opened.notes,
            *headless_notes(table, granularity),
            *doubtful_rows(table),
            *(saturation_notes(found[1]) if found else ()),
            *cache_notes(_count_rows(known), kept.trouble),
        ),
        draws,
        vectors_table(measurements, opened.base.config) if vectors else None,
        found,
        leave_out_floored,
    )


def _require(argument: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a word that an argument does not know."""
    if value not in allowed:
        words = ", ".join(str(word) for word in allowed)
        raise ManifestError(f"{argument}: {value!r} is not one; give one of {words}")


def _draws(
    opened: Opened, measurements: Sequence[Measurement], null: Null | None, bar: Progress
) -> Draws | None:
    """Draw what random updates show, and tell how far that is."""
    if null is None:
        return None
    task = bar.add_task("random updates", total=None, note="")
    return draw(
        opened.base,
        measurements,
        null,
        on_group=lambda done, total: bar.update(task, completed=done, total=total),
    )


def _spectra(opened: Opened, bar: Progress) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure singular spectra, and tell how far that is."""
    task = bar.add_task("spectra", total=None, note="")
    return measure_spectra(
        opened.base,
        opened.pairings,
        on_part=lambda done, total, matrix: bar.update(
            task, completed=done, total=total, note=str(matrix)
        ),
    )


def _count_rows(measurements: Iterable[Measurement]) -> int:
    return sum(len(measurement.changes) for measurement in measurements)


def _in_order(measurements: Iterable[Measurement], opened: Opened) -> list[Measurement]:
    """Sort by checkpoint, then by matrix as the base has them."""
    checkpoints = {id(member.checkpoint): i for i, member in enumerate(opened.members)}
    matrices = {pairing.matrix: i for i, pairing in enumerate(opened.pairings)}
    return sorted(
        measurements, key=lambda m: (checkpoints[id(m.source.checkpoint)], matrices[m.matrix])
    )


def plan(
    paths_or_manifest: str | Path | Sequence[str | Path],
    base: str | Path | None = None,
    matrices: str | Sequence[str] | None = None,
    given: Given = NOTHING_GIVEN,
    progress: bool = True,
) -> list[Reading]:
    """Tell how many bytes :func:`compare` would read, from headers alone; no tensor is read.

    Parameters
    ----------
    paths_or_manifest : path or sequence of paths
        Run folders, or one manifest ending in ``.yaml``.
    base : path or location, optional
        The pre-trained model; by default the manifest's, else what the adapters name.
    matrices : str or sequence of str, optional
        As for :func:`compare`; by default the manifest's, else query and value.
    given : Given
        What the checkpoints do not say themselves, such as α.
    progress : bool
        Whether to show a progress bar on standard error.

    Returns
    -------
    list of Reading
        One for the base, then one per checkpoint.

    Raises
    ------
    WdaError
        As :func:`compare` does before it reads.
    """
    manifest = make_manifest(paths_or_manifest, base, matrices, given=given)
    with progress_bar(progress) as bar:
        opened = open_all(manifest, bar)
    return readings(opened.base, opened.members, opened.pairings)


def reopen(path: str | Path, leave_out_floored: bool = False) -> Comparison:
    """Make a comparison from a saved table and what lies beside it, fitted and drawn again.

    Parameters
    ----------
    path : path
        ``table.parquet`` or ``table.csv`` of an earlier comparison, or its folder.
    leave_out_floored : bool
        Whether to leave rows under three times their floor out of the fits.

    Returns
    -------
    Comparison
        Its provenance names the table's file and hash.

    Raises
    ------
    TableError
        When the file is no table.
    """
    file = table_file(Path(path))
    table = read_table(file)
    return Comparison(
        table,
        provenance(table=describe([file])),
        tuple(doubtful_rows(table)),
        draws=read_draws(table, file.parent),
        vectors=read_vectors(file.parent),
        spectra=read_spectra(file.parent),
        leave_out_floored=leave_out_floored,
    )
