"""The tidy table: one row per run, checkpoint and matrix. Its columns are described here alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from wda.errors import TableError, listing


@dataclass(frozen=True)
class Column:
    """What a column holds.

    Attributes
    ----------
    dtype : str
        Its pandas dtype.
    meaning : str
        What the number is, with unit and range.
    required : bool
        Whether a table has to have it. A column that may be missing is then empty throughout.
    """

    dtype: str
    meaning: str
    required: bool = True


def _optional(dtype: str, meaning: str) -> Column:
    return Column(dtype, meaning, required=False)


# Beside the table, where it was asked for: every vector's own changes, singular values, and what
# they come to.
VECTORS_FILE = "vectors.parquet"
VALUES_FILE = "spectra.parquet"
SUMMARY_FILE = "spectra.csv"

# Which quantiles of the vectors' changes stand in the table.
QUANTILES = (5, 25, 50, 75, 95)

COLUMNS: dict[str, Column] = {
    "run": Column("string", "name of the run"),
    "method": Column("string", "how it was trained: ft, lora, dora, …"),
    "rank": _optional("Int64", "rank of the update; empty where it is not bounded by a factor's"),
    "seed": Column("Int64", "seed of the training; empty where unknown"),
    "step": Column("Int64", "training step of the checkpoint; empty where unknown"),
    "module": Column("string", "path of the module in the base"),
    "layer": Column("Int64", "first number in that path; empty outside the layers"),
    "matrix": Column("string", "label: query, key, value, output, gate, up, down, or a last name"),
    "head": _optional("Int64", "number of the attention head, where there is a row per head"),
    "granularity": _optional(
        "string",
        "what the row is of: all vectors of a matrix ('vector'), those of one attention head "
        "('head'), or the matrix taken as one vector ('matrix')",
    ),
    "per": Column("string", "'output': one vector per output feature; 'input': per input feature"),
    "out_features": Column("int64", "rows of the matrix"),
    "in_features": Column("int64", "columns of the matrix"),
    "n_vectors": Column("int64", "number of vectors: rows or columns, by `per`"),
    "delta_m": Column("float64", "ΔM: mean |m_t − m_0| over the vectors, in units of the weight"),
    "delta_d": Column("float64", "ΔD: mean 1 − cos(w_t, w_0), 0 to 2; empty if none has direction"),
    "delta_m_signed": _optional("float64", "mean m_t − m_0: positive where vectors grew"),
    "delta_m_relative": _optional("float64", "mean |m_t − m_0|/m_0 over vectors that are not 0"),
    "update_norm": _optional("float64", "‖ΔW‖_F, in units of the weight"),
    "relative_update": _optional("float64", "‖ΔW‖_F/‖W0‖_F"),
    "share_grown": _optional("float64", "share of the vectors with m_t > m_0, 0 to 1"),
    **{
        f"magnitude_q{q:02}": _optional("float64", f"{q} % quantile of m_t − m_0 over the vectors")
        for q in QUANTILES
    },
    **{
        f"direction_q{q:02}": _optional("float64", f"{q} % quantile of 1 − cos over the vectors")
        for q in QUANTILES
    },
    "floor_delta_m": _optional("float64", "ΔM that rounding to the stored dtypes alone would give"),
    "floor_delta_d": _optional("float64", "ΔD that rounding to the stored dtypes alone would give"),
    "below_floor": _optional("boolean", "whether ΔM or ΔD is under three times its floor"),
    "n_undirected": Column("int64", "vectors that are zero before or after, left out of ΔD"),
    "dtype": Column("string", "dtype of the checkpoint's numbers"),
    "base_dtype": Column("string", "dtype of W0's numbers"),
}


def make_table(rows: Iterable[dict[str, object]]) -> pd.DataFrame:
    """Make a table with every column in its order and dtype.

    Parameters
    ----------
    rows : iterable of dict
        One dictionary per row, keyed by column.

    Returns
    -------
    pandas.DataFrame
        Sorted as given.
    """
    frame = pd.DataFrame(list(rows), columns=list(COLUMNS))
    return frame.astype({name: column.dtype for name, column in COLUMNS.items()})


def write_table(table: pd.DataFrame, folder: Path) -> None:
    """Write ``table.parquet`` and ``table.csv``; both give back every digit."""
    table.to_parquet(folder / "table.parquet", index=False)
    table.to_csv(folder / "table.csv", index=False)


def table_file(path: Path) -> Path:
    """Give the file of a table: the path itself, or ``table.parquet`` in the folder it names."""
    return path / "table.parquet" if path.is_dir() else path


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a saved table.

    Parameters
    ----------
    path : path
        A ``.parquet`` or ``.csv`` file, or a folder that holds ``table.parquet``.

    Returns
    -------
    pandas.DataFrame
        With the columns of :data:`COLUMNS`.

    Raises
    ------
    TableError
        When the file is none, is damaged, or lacks columns or rows.
    """
    file = table_file(Path(path))
    if not file.is_file():
        raise TableError(f"{file}: no such table; give the table.parquet of wda compare --out")
    if file.suffix not in (".parquet", ".csv"):
        raise TableError(f"{file}: a table ends in .parquet or .csv")
    read = pd.read_parquet if file.suffix == ".parquet" else pd.read_csv
    try:
        table = read(file)
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise TableError(f"{file}: cannot be read as a table: {why}") from None
    return check_table(table, str(file))


def read_vectors(folder: Path) -> pd.DataFrame | None:
    """Read every vector's own changes, which may lie beside a table; None where they do not.

    Raises
    ------
    TableError
        When the file is damaged.
    """
    file = folder / VECTORS_FILE
    if not file.is_file():
        return None
    try:
        return pd.read_parquet(file)
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise TableError(f"{file}: cannot be read: {why}; delete it to go on without") from None


def check_table(table: pd.DataFrame, name: str = "table") -> pd.DataFrame:
    """Make sure a table has all columns, in the right dtypes, and at least one row.

    Columns that it may lack, as tables of earlier versions do, are added without values.

    Raises
    ------
    TableError
        Naming what is missing.
    """
    missing = [name for name, column in COLUMNS.items() if name not in table.columns]
    if missing_required := [name for name in missing if COLUMNS[name].required]:
        raise TableError(
            f"{name}: columns missing: {listing(missing_required, 20)}; is it a wda table?"
        )
    if table.empty:
        raise TableError(f"{name}: has no rows; nothing to fit or draw")
    filled = table.assign(**dict.fromkeys(missing, np.nan))
    try:
        return filled.astype({column: spec.dtype for column, spec in COLUMNS.items()})
    except (TypeError, ValueError) as error:
        raise TableError(f"{name}: a column holds what it cannot: {error}") from None
