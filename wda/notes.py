"""What a reader of a table should be wary of, one line each."""

from __future__ import annotations

import pandas as pd

from wda.changes import Granularity
from wda.errors import listing


def cache_notes(known: int, trouble: str | None) -> list[str]:
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


def headless_notes(table: pd.DataFrame, granularity: Granularity) -> list[str]:
    """Say which matrices have no attention heads to have rows, where these were asked for."""
    rows = table[table["head"].isna()]
    if granularity != "head" or rows.empty:
        return []
    return [
        f"one row for all vectors of {listing(dict.fromkeys(rows['matrix']), 7)}: they are of no "
        "attention heads along this axis, or the base's config.json does not tell how many there "
        "are"
    ]


def doubtful_rows(table: pd.DataFrame) -> list[str]:
    """Say once of which rows something is doubtful: no direction, or no more than rounding."""
    notes = []
    if not (rows := table[table["n_undirected"] > 0]).empty:
        notes.append(
            f"vectors that are zero before or after have no direction and are left out of ΔD: "
            f"{rows['n_undirected'].sum()} in {len(rows)} rows of the table "
            f"({listing(dict.fromkeys(rows['module']), 4)}); see the column n_undirected"
        )
    low = table["below_floor"].fillna(False).astype(bool)
    for run, rows in table.groupby("run", sort=False):
        if count := int(low[rows.index].sum()):
            notes.append(
                f"{run}: {count} of {len(rows)} points lie under three times what rounding to the "
                "stored numbers alone would give (below_floor); they are grey in the figures"
            )
    return notes
