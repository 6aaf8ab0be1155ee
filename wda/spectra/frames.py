"""The two tables of spectra: their columns, how they are written and read, what to be wary of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from wda.errors import TableError, listing
from wda.table import COLUMNS as TABLE_COLUMNS
from wda.table import SUMMARY_FILE, VALUES_FILE, Column

# Matrix → how the summary's columns about it begin.
PREFIXES = {"update": "", "w0": "w0_", "wt": "wt_"}

_WHOSE = ("run", "seed", "step", "module", "layer", "matrix")
_OF = {"update": "ΔW", "w0": "W0", "wt": "Wt"}

# All singular values, one row each.
VALUES_COLUMNS: dict[str, Column] = {
    **{name: TABLE_COLUMNS[name] for name in _WHOSE},
    "of": Column("string", "which matrix: 'w0', 'wt', or 'update' for ΔW = Wt − W0"),
    "index": Column("int64", "place of the value, from 0 for the largest"),
    "singular_value": Column("float64", "σ, in units of the weight"),
}


def _about(prefix: str, of: str) -> dict[str, Column]:
    """Describe the numbers that a spectrum comes to."""
    return {
        f"{prefix}effective_rank": Column("float64", f"exp(entropy) of {of}; empty with it"),
        f"{prefix}entropy": Column(
            "float64",
            f"−Σ p·ln p of {of}, p = σ/Σσ; empty of zero, and where not all σ are computed",
        ),
        f"{prefix}stable_rank": Column("float64", f"‖·‖_F²/σ_1² of {of}; empty of zero"),
        f"{prefix}rank_90": Column(
            "Int64", f"how many leading values hold 90 % of Σσ² of {of}; empty where too few are"
        ),
    }


# What the spectra come to: one row per run, checkpoint and matrix.
COLUMNS: dict[str, Column] = {
    **{name: TABLE_COLUMNS[name] for name in ("run", "method", *_WHOSE[1:])},
    "out_features": TABLE_COLUMNS["out_features"],
    "in_features": TABLE_COLUMNS["in_features"],
    "rank_bound": Column("Int64", "rank that ΔW cannot exceed: its factors'; empty without such"),
    **{
        name: column
        for of, prefix in PREFIXES.items()
        for name, column in _about(prefix, _OF[of]).items()
    },
    "k": Column("int64", "how many leading left singular vectors of Wt are looked at"),
    "epsilon": Column("float64", "ε, the cosine below which a direction is an intruder, 0 to 1"),
    "intruders": Column("int64", "those of the k whose cosine with all of W0's is below ε"),
    "intruder_energy": Column("float64", "their share of the k directions' Σσ², 0 to 1"),
    "random_intruders": Column("float64", "of k random directions, how many would be intruders"),
    "random_cosine": Column(
        "float64", "median of the largest cosine that a random direction has with W0's, 0 to 1"
    ),
    "w0_vectors": Column(
        "int64",
        "left singular vectors of W0 that were compared with; where W0 is large only the leading "
        "ones, and the intruders are at most so many",
    ),
    "principal_angle_mean": Column(
        "float64", "mean angle between the k-dimensional leading subspaces of W0 and Wt, degrees"
    ),
    "principal_angle_max": Column("float64", "the largest of these angles, 0 to 90 degrees"),
    "error": Column(
        "float64",
        "how far a singular value may lie from a true one, as share of the largest; empty where "
        "all are computed exactly",
    ),
}


def make_values(rows: Iterable[Mapping[str, object]]) -> pd.DataFrame:
    """Make the table of values from one row per spectrum, with its values in an array."""
    frame = pd.DataFrame(list(rows), columns=list(VALUES_COLUMNS))
    return _typed(frame.explode(["index", "singular_value"], ignore_index=True), VALUES_COLUMNS)


def make_summary(rows: Iterable[Mapping[str, object]]) -> pd.DataFrame:
    """Make the summary from its rows."""
    return _typed(pd.DataFrame(list(rows), columns=list(COLUMNS)), COLUMNS)


def _typed(frame: pd.DataFrame, columns: Mapping[str, Column]) -> pd.DataFrame:
    return frame.astype({name: column.dtype for name, column in columns.items()})


def write_spectra(values: pd.DataFrame, summary: pd.DataFrame, folder: Path) -> None:
    """Write ``spectra.parquet``, all singular values, and ``spectra.csv``, what they come to."""
    values.to_parquet(folder / VALUES_FILE, index=False)
    summary.to_csv(folder / SUMMARY_FILE, index=False)


def read_spectra(folder: str | Path) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Read the spectra that lie in a folder.

    Parameters
    ----------
    folder : path
        A folder that ``wda compare --out`` wrote.

    Returns
    -------
    tuple of pandas.DataFrame or None
        The singular values, columns as in :data:`VALUES_COLUMNS`, and the summary, columns as in
        :data:`COLUMNS`; None where the folder holds none.

    Raises
    ------
    TableError
        When one of the two files is missing, damaged, or lacks columns.
    """
    files = {Path(folder) / VALUES_FILE: VALUES_COLUMNS, Path(folder) / SUMMARY_FILE: COLUMNS}
    missing = [file for file in files if not file.is_file()]
    if len(missing) == len(files):
        return None
    if missing:
        raise TableError(
            f"{missing[0]}: is missing beside the other file of the spectra; measure them again, "
            "or delete the other to go on without"
        )
    values, summary = (_read(file, columns) for file, columns in files.items())
    return values, summary


def _read(file: Path, columns: Mapping[str, Column]) -> pd.DataFrame:
    read = pd.read_parquet if file.suffix == ".parquet" else pd.read_csv
    try:
        frame = read(file)
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise TableError(f"{file}: cannot be read: {why}; delete it to go on without") from None
    if missing := [name for name in columns if name not in frame.columns]:
        raise TableError(f"{file}: columns missing: {listing(missing, 20)}; measure them again")
    try:
        return _typed(frame[list(columns)], columns)
    except (TypeError, ValueError) as error:
        raise TableError(f"{file}: a column holds what it cannot: {error}") from None


def saturation_notes(summary: pd.DataFrame) -> list[str]:
    """Say where the number of intruders tells nothing.

    It has a ceiling, k, which a random direction nearly always reaches. Where most matrices of a
    run are at it, the number no longer tells how much they changed. And where the matrices are so
    small, or ε so high or so low, that random directions do not count, few intruders are no sign
    of a change that W0 knows.

    Parameters
    ----------
    summary : pandas.DataFrame
        As :func:`measure_spectra` gives it.

    Returns
    -------
    list of str
        One line each, for the user to read.
    """
    notes = []
    for run, rows in summary.groupby("run", sort=False):
        full = int((rows["intruders"] == rows["k"]).sum())
        if 2 * full > len(rows):
            notes.append(
                f"{run}: in {full} of {len(rows)} matrices all leading directions are intruders, "
                "as random ones would be: the count is at its ceiling and tells no more; read "
                "intruder_energy"
            )
    small = summary["random_intruders"] < summary["k"] / 2
    if small.any():
        notes.append(
            f"in {int(small.sum())} of {len(summary)} matrices even random directions are seldom "
            f"intruders (a cosine of {summary.loc[small, 'random_cosine'].min():.2f} or more with "
            "one of W0's comes by chance): the matrices are too small for this ε, and few "
            "intruders say nothing"
        )
    return notes
