"""The whole path: checkpoints → updates → decomposition → table → statistics → figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
from rich.progress import Progress

from wda.cache import open_cache
from wda.checkpoints import FullCheckpoint, Given, open_base
from wda.checkpoints.given import NOTHING_GIVEN
from wda.decomposition import Per
from wda.engine import usable_device
from wda.errors import LocationError, ManifestError, listing
from wda.files import describe, staged_folder
from wda.locations import locate, of_model_reference
from wda.manifest import W0, Manifest, make_manifest
from wda.origins import on_what_they_were_trained
from wda.pairing import Pairing, pair
from wda.places import Place, shown
from wda.plan import Reading, readings
from wda.progress import progress_bar
from wda.provenance import provenance
from wda.runs import Member, open_runs
from wda.schedule import DEFAULT_MEMORY, Measurement, Work, measure
from wda.statistics import compute_statistics
from wda.table import make_table, read_table, table_file, write_table


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes
    ----------
    table : pandas.DataFrame
        One row per run, checkpoint and matrix; columns in :data:`wda.table.COLUMNS`.
    statistics : pandas.DataFrame
        One row per run and matrix label; columns in :data:`wda.statistics.COLUMNS`.
    provenance : dict
        Command, versions, inputs and choices it was made with.
    notes : tuple of str
        What was left out and why.
    """

    table: pd.DataFrame
    statistics: pd.DataFrame
    provenance: dict[str, object]
    notes: tuple[str, ...]

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

        write_table(self.table, folder)
        self.statistics.to_csv(folder / "statistics.csv", index=False)
        figures.save(figures.scatter_grid(self.table, self.statistics), folder, "scatter")
        text = json.dumps(self.provenance, indent=2, ensure_ascii=False)
        (folder / "provenance.json").write_text(text + "\n", encoding="utf-8")


def compare(  # noqa: PLR0913 - all but the first have a default
    paths_or_manifest: str | Path | Sequence[str | Path],
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
    progress: bool = True,
) -> Comparison:
    """Measure how far the checkpoints of one or more runs moved from their base.

    Parameters
    ----------
    paths_or_manifest : path or sequence of paths
        Run folders (each with ``checkpoint-<step>`` folders, or itself a checkpoint), or one
        manifest ending in ``.yaml``.
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
    manifest = make_manifest(paths_or_manifest, base, matrices, per, given, w0)
    with progress_bar(progress) as bar:
        opened = _open(manifest, bar)
        with open_cache(cache, opened.base, manifest.per, computing) as kept:
            task = bar.add_task("comparing", total=None, note="")
            known, left = kept.split(opened.pairings)
            new = measure(
                opened.base,
                left,
                manifest.per,
                Work(executor, max_memory, computing),
                on_part=lambda done, total, matrix: bar.update(
                    task, completed=done, total=total, note=str(matrix)
                ),
                on_matrix=kept.keep,
            )
    measurements = _in_order([*known, *new], opened)
    table = make_table(_row(measurement) for measurement in measurements)
    facts = _facts(manifest, opened.members)
    facts |= {"device": computing, "rows_computed_before": len(known)}
    facts["w0"] = manifest.w0 or ("dequantized" if opened.base.quantised else "as stored")
    facts["base"] = {
        "location": opened.base_location,
        "quantised": opened.base.quantised,
        "files": describe(opened.base.files),
    }
    notes = [*opened.notes, *_undirected_note(table), *_cache_note(len(known), kept.trouble)]
    return Comparison(table, compute_statistics(table), provenance(**facts), tuple(notes))


def _in_order(measurements: Iterable[Measurement], opened: _Opened) -> list[Measurement]:
    """Sort by checkpoint, then by matrix as the base has them."""
    checkpoints = {id(member.checkpoint): i for i, member in enumerate(opened.members)}
    matrices = {pairing.matrix: i for i, pairing in enumerate(opened.pairings)}
    return sorted(
        measurements, key=lambda m: (checkpoints[id(m.source.checkpoint)], matrices[m.matrix])
    )


def _cache_note(known: int, trouble: str | None) -> list[str]:
    """Say how much was not computed again, and whether the rest was kept."""
    notes = []
    if known:
        notes.append(
            f"{known} rows were computed before and are taken from the cache; --no-cache "
            "(cache=False) computes them anew"
        )
    if trouble:
        notes.append(f"results could not be kept for the next time: {trouble}")
    return notes


def _undirected_note(table: pd.DataFrame) -> list[str]:
    """Say once that vectors without direction were left out, and of how many matrices."""
    rows = table[table["n_undirected"] > 0]
    if rows.empty:
        return []
    modules = listing(dict.fromkeys(rows["module"]), 4)
    return [
        f"vectors that are zero before or after have no direction and are left out of ΔD: "
        f"{rows['n_undirected'].sum()} in {len(rows)} rows of the table ({modules}); see the "
        "column n_undirected"
    ]


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
        opened = _open(manifest, bar)
    return readings(opened.base, opened.members, opened.pairings)


def reopen(path: str | Path) -> Comparison:
    """Make a comparison from a saved table alone: fitted again, ready to be drawn again.

    Parameters
    ----------
    path : path
        ``table.parquet`` or ``table.csv`` of an earlier comparison, or its folder.

    Returns
    -------
    Comparison
        Its provenance names the table's file and hash.

    Raises
    ------
    TableError
        When the file is no table.
    """
    table = read_table(Path(path))
    facts = provenance(table=describe([table_file(Path(path))]))
    return Comparison(table, compute_statistics(table), facts, ())


@dataclass(frozen=True)
class _Opened:
    """Everything that is to be compared, opened and paired; no tensor is read yet."""

    base_location: str
    base: FullCheckpoint
    members: Sequence[Member]
    pairings: Sequence[Pairing]
    notes: Sequence[str]


def _open(manifest: Manifest, bar: Progress) -> _Opened:
    task = bar.add_task("opening", total=None, note="")
    members = open_runs(
        manifest.runs,
        on_found=lambda checkpoints: bar.update(task, total=checkpoints + 1),  # and the base
        on_opened=lambda: bar.advance(task),
    )
    location, place = _find_base(manifest, members)
    base = open_base(place)
    members = on_what_they_were_trained(members, base, manifest.w0)
    bar.update(task, advance=1, note="pairing matrices")
    pairings, notes = pair(base, members, manifest.matrices)
    bar.update(task, note="")
    return _Opened(shown(location), base, members, pairings, notes)


def _find_base(manifest: Manifest, members: Sequence[Member]) -> tuple[str, Place]:
    """Give location and place of the base: the manifest's, else what the adapters name."""
    if manifest.base is not None:
        return manifest.base, locate(manifest.base)
    named = sorted({member.checkpoint.base for member in members if member.checkpoint.base})
    if len(named) > 1:
        raise ManifestError(
            f"base: the adapters name several bases ({listing(map(shown, named))}); compare runs "
            "of one base at a time, or give the right one with --base"
        )
    if not named:
        raise LocationError(
            "base: the pre-trained model is not known, for none of these checkpoints names it; "
            "give it with --base LOCATION"
        )
    location = of_model_reference(named[0])
    try:
        return location, locate(location)
    except LocationError as error:
        raise LocationError(
            f"base: the adapters name {shown(named[0])} as their base, which is not to be had "
            f"({error}); give it with --base LOCATION"
        ) from None


def _row(measurement: Measurement) -> dict[str, object]:
    member, matrix = measurement.source.member, measurement.matrix
    change = measurement.change
    return {
        "run": member.run,
        "method": member.method,
        "seed": member.seed,
        "step": member.step,
        "module": matrix.module,
        "layer": matrix.layer,
        "matrix": matrix.label,
        "per": measurement.per,
        "out_features": matrix.shape[0],
        "in_features": matrix.shape[1],
        "n_vectors": change.n_vectors,
        "delta_m": change.delta_m,
        "delta_d": change.delta_d,
        "n_undirected": change.n_undirected,
        "dtype": change.dtype,
        "base_dtype": change.base_dtype,
    }


def _facts(manifest: Manifest, members: Sequence[Member]) -> dict[str, object]:
    return {
        "per": manifest.per,
        "matrices": manifest.matrices,
        "checkpoints": [
            {
                "run": member.run,
                "method": member.method,
                "seed": member.seed,
                "step": member.step,
                "layout": member.checkpoint.layout,
                "path": str(member.checkpoint.path),
                "files": [
                    {"file": file.name, "bytes": file.stat().st_size}
                    for file in member.checkpoint.files
                ],
            }
            for member in members
        ],
    }
