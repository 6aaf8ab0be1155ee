"""The tidy table: one row per run, checkpoint and matrix. Its columns are described here alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

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
    """

    dtype: str
    meaning: str


COLUMNS: dict[str, Column] = {
    "run": Column("string", "name of the run"),
    "method": Column("string", "how it was trained: ft, lora, dora, …"),
    "seed": Column("Int64", "seed of the training; empty where unknown"),
    "step": Column("Int64", "training step of the checkpoint; empty where unknown"),
    "module": Column("string", "path of the module in the base"),
    "layer": Column("Int64", "first number in that path; empty outside the layers"),
    "matrix": Column("string", "label: query, key, value, output, gate, up, down, or a last name"),
    "per": Column("string", "'output': one vector per output feature; 'input': per input feature"),
    "out_features": Column("int64", "rows of the matrix"),
    "in_features": Column("int64", "columns of the matrix"),
    "n_vectors": Column("int64", "number of vectors: rows or columns, by `per`"),
    "delta_m": Column("float64", "ΔM: mean |m_t − m_0| over the vectors, in units of the weight"),
    "delta_d": Column("float64", "ΔD: mean 1 − cos(w_t, w_0), 0 to 2; empty if none has direction"),
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


def check_table(table: pd.DataFrame, name: str = "table") -> pd.DataFrame:
    """Make sure a table has all columns, in the right dtypes, and at least one row.

    Raises
    ------
    TableError
        Naming what is missing.
    """
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise TableError(f"{name}: columns missing: {listing(missing, 20)}; is it a wda table?")
    if table.empty:
        raise TableError(f"{name}: has no rows; nothing to fit or draw")
    try:
        return table.astype({column: spec.dtype for column, spec in COLUMNS.items()})
    except (TypeError, ValueError) as error:
        raise TableError(f"{name}: a column holds what it cannot: {error}") from None
