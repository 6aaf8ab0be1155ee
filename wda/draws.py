"""What random updates of the measured size show, draw by draw, beside each row of a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from wda.errors import TableError

FILE = "nulls.parquet"

# What tells the rows of a table apart, so that draws are found again beside theirs.
_KEY = ["run", "seed", "step", "module", "matrix", "head", "per"]


@dataclass(frozen=True)
class Draws:
    """ΔM and ΔD of random updates, each of the size that was measured in its row.

    One column is one draw of everything: a random direction for each matrix of each run, as large
    at every checkpoint as the update that was measured there.

    Attributes
    ----------
    null : numpy.ndarray of str
        Which random updates, row by row: ``isotropic``, or ``rank 8``.
    delta_m, delta_d : numpy.ndarray
        Shape (rows, draws), row by row as the table they belong to.
    """

    null: np.ndarray
    delta_m: np.ndarray
    delta_d: np.ndarray

    def __len__(self) -> int:
        return int(self.delta_m.shape[1])

    def of(self, rows: np.ndarray) -> Draws:
        """Give the draws of some rows, named by their positions or by a mask."""
        return Draws(self.null[rows], self.delta_m[rows], self.delta_d[rows])


def write_draws(draws: Draws, table: pd.DataFrame, folder: Path) -> None:
    """Write ``nulls.parquet``: one row per row of the table, the draws in lists."""
    frame = table[_KEY].assign(
        null=draws.null, delta_m=list(draws.delta_m), delta_d=list(draws.delta_d)
    )
    frame.to_parquet(folder / FILE, index=False)


def read_draws(table: pd.DataFrame, folder: Path) -> Draws | None:
    """Read the draws that lie beside a table; None where there are none.

    Raises
    ------
    TableError
        When they are damaged, or belong to another table.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        frame = pd.read_parquet(file)
        found = Draws(
            frame["null"].to_numpy(str),
            np.stack(frame["delta_m"].to_list()),
            np.stack(frame["delta_d"].to_list()),
        )
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise TableError(f"{file}: cannot be read: {why}; delete it to go on without") from None
    if not frame[_KEY].astype(str).equals(table[_KEY].astype(str).reset_index(drop=True)):
        raise TableError(
            f"{file}: belongs to another table than the one beside it; delete it to go on without"
        )
    return found
