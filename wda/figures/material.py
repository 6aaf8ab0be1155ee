"""What figures are made of: a table, its fits, and what lies beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wda.draws import Draws, read_draws
from wda.errors import TableError
from wda.table import SUMMARY_FILE, VALUES_FILE, VECTORS_FILE


@dataclass(frozen=True)
class Material:
    """All that the figures of one comparison are drawn from.

    Attributes
    ----------
    table : pandas.DataFrame
        Columns as in :data:`wda.table.COLUMNS`.
    statistics : pandas.DataFrame
        Its fits, columns as in :data:`wda.statistics.COLUMNS`.
    draws : Draws, optional
        What random updates show, row by row as the table.
    vectors : pandas.DataFrame, optional
        The changes vector by vector, as in ``vectors.parquet``.
    values : pandas.DataFrame, optional
        Singular values, as in ``spectra.parquet``.
    summary : pandas.DataFrame, optional
        What follows from them, matrix by matrix, as in ``spectra.csv``.
    """

    table: pd.DataFrame
    statistics: pd.DataFrame
    draws: Draws | None = None
    vectors: pd.DataFrame | None = None
    values: pd.DataFrame | None = None
    summary: pd.DataFrame | None = None


def read_material(table: pd.DataFrame, statistics: pd.DataFrame, folder: Path) -> Material:
    """Put a table and its fits together with what lies in its folder.

    Parameters
    ----------
    table, statistics : pandas.DataFrame
        As they were saved in the folder, or made from it.
    folder : Path
        May hold ``nulls.parquet``, ``vectors.parquet``, ``spectra.parquet`` and ``spectra.csv``.

    Returns
    -------
    Material
        Without what is not there.

    Raises
    ------
    TableError
        When a file is damaged, or the draws belong to another table.
    """
    return Material(
        table,
        statistics,
        read_draws(table, folder),
        _read(folder / VECTORS_FILE),
        _read(folder / VALUES_FILE),
        _read(folder / SUMMARY_FILE),
    )


def _read(file: Path) -> pd.DataFrame | None:
    if not file.is_file():
        return None
    try:
        frame = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise TableError(f"{file}: cannot be read: {why}; delete it to go on without") from None
    known = {"layer": "Int64", "step": "Int64", "seed": "Int64"}
    return frame.astype({name: dtype for name, dtype in known.items() if name in frame})
