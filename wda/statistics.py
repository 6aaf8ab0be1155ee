"""Table → fits: how ΔM goes with ΔD, per run and matrix."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from wda.table import check_table

# Statistics column → what it holds.
COLUMNS: dict[str, str] = {
    "run": "name of the run",
    "method": "how it was trained",
    "matrix": "label of the matrices fitted, or 'all'",
    "per": "which axis the vectors are",
    "n": "number of points: layers × checkpoints (× matrices)",
    "pearson_r": "Pearson's correlation of ΔM and ΔD, −1 to 1; empty where it has no meaning",
    "slope": "slope of the least-squares line of ΔM on ΔD",
    "intercept": "ΔM of that line at ΔD = 0",
}

ALL = "all"


class Fit(NamedTuple):
    """A least-squares line y = slope·x + intercept, and how closely the points follow one."""

    n: int
    pearson_r: float
    slope: float
    intercept: float


def fit_line(x: np.ndarray, y: np.ndarray) -> Fit:
    """Fit y on x, leaving out points with a missing coordinate.

    Parameters
    ----------
    x, y : numpy.ndarray
        Coordinates of the points.

    Returns
    -------
    Fit
        With NaN for what is not determined: everything with fewer than three points or when all x
        are equal, r also when all y are equal.
    """
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    # Scaled to their spread, so that ΔD of 1e-9 is no closer to "constant" than ΔD of 1.
    if len(x) < 3 or _constant(x):
        return Fit(len(x), np.nan, np.nan, np.nan)
    line = stats.linregress(x, y)
    r = np.nan if _constant(y) else float(line.rvalue)
    return Fit(len(x), r, float(line.slope), float(line.intercept))


def compute_statistics(table: pd.DataFrame) -> pd.DataFrame:
    """Fit every run's points, for each matrix label and for all of them together.

    Parameters
    ----------
    table : pandas.DataFrame
        A table with the columns of :data:`wda.table.COLUMNS`.

    Returns
    -------
    pandas.DataFrame
        Columns as in :data:`COLUMNS`; one row per run and label, then one with label ``all``.

    Raises
    ------
    TableError
        When columns are missing or there is no row.
    """
    table = check_table(table)
    rows = []
    for (run, method, per), of_run in table.groupby(["run", "method", "per"], sort=False):
        labels = [*dict.fromkeys(of_run["matrix"]), ALL]
        for label in labels:
            points = of_run if label == ALL else of_run[of_run["matrix"] == label]
            fit = fit_line(points["delta_d"].to_numpy(), points["delta_m"].to_numpy())
            rows.append({"run": run, "method": method, "matrix": label, "per": per} | fit._asdict())
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _constant(values: np.ndarray) -> bool:
    """Tell whether values differ by no more than rounding."""
    return bool(np.ptp(values) <= 8 * np.finfo(float).eps * np.abs(values).max())
