"""The mean over repetitions of a training that differ in their seeds alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from scipy import stats

from wda.statistics.intervals import LEVEL, NO_INTERVAL, Interval


def mean_of_repetitions(values: Iterable[float]) -> tuple[float, Interval]:
    """Give the mean of repetitions and its 95 % interval by Student's t.

    Three repetitions give an interval of ±2.48 standard deviations: it says how little three are.

    Parameters
    ----------
    values : iterable of float
        One number for each seed; NaN are left out.

    Returns
    -------
    mean : float
        NaN without a value.
    interval : Interval
        NaN with fewer than two.

    Examples
    --------
    >>> mean, (low, high) = mean_of_repetitions([0.70, 0.72, 0.74])
    >>> print(f"{mean:.2f} [{low:.3f}, {high:.3f}]")
    0.72 [0.670, 0.770]
    """
    known = np.array(list(values), float)
    known = known[np.isfinite(known)]
    if not known.size:
        return math.nan, NO_INTERVAL
    mean = float(known.mean())
    if known.size == 1:
        return mean, NO_INTERVAL
    error = known.std(ddof=1) / math.sqrt(known.size)
    half = float(stats.t.ppf((1 + LEVEL) / 2, known.size - 1) * error)
    return mean, Interval(mean - half, mean + half)
