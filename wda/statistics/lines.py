"""The line through a cloud of points."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats


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
    if len(x) < 3 or is_constant(x):
        return Fit(len(x), np.nan, np.nan, np.nan)
    line = stats.linregress(x, y)
    r = np.nan if is_constant(y) else float(line.rvalue)
    return Fit(len(x), r, float(line.slope), float(line.intercept))


def rounding(values: np.ndarray) -> float:
    """Give the difference that is no more than rounding: ΔD of 1e-9 is as well told as ΔD of 1."""
    return float(8 * np.finfo(float).eps * np.abs(values).max())


def is_constant(values: np.ndarray) -> bool:
    """Tell whether values differ by no more than rounding."""
    return bool(np.ptp(values) <= rounding(values))
