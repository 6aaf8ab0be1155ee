"""What figures are made of: a table, its fits, and what lies beside it."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from wda.draws import Draws


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
