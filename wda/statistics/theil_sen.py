"""The median slope of the lines through two points each, which outliers hardly move."""

from __future__ import annotations

import numpy as np

from wda.statistics.clouds import Cloud
from wda.statistics.intervals import NO_INTERVAL, Interval, groupings, student_interval

# More pairs than this are not needed: their median is as good as known.
MOST_PAIRS = 200_000
_SEED = 20240214


def theil_sen(cloud: Cloud) -> tuple[float, Interval]:
    """Give the Theil–Sen slope and its interval.

    Of clouds with more than `MOST_PAIRS` pairs that many are drawn, always the same ones.
    """
    first, second = _pairs(len(cloud))
    run, rise = cloud.x[second] - cloud.x[first], cloud.y[second] - cloud.y[first]
    steep = run != 0
    slopes = rise[steep] / run[steep]
    order = np.argsort(slopes)
    slopes = slopes[order]
    if not len(slopes):
        return np.nan, NO_INTERVAL
    ends = np.stack([first, second])[:, steep][:, order]
    without = [_without_each(slopes, *grouping[ends]) for grouping in groupings(cloud)]
    value = _middle(slopes)
    return value, student_interval(value, without)


def _pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    if n * (n - 1) // 2 <= MOST_PAIRS:
        return np.triu_indices(n, 1)
    first, second = np.random.default_rng(_SEED).integers(n, size=(2, MOST_PAIRS))
    return first, second


def _without_each(slopes: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Median of the sorted slopes without the pairs that touch each group in turn."""
    groups = range(int(max(first.max(), second.max())) + 1)
    return np.array([_middle(slopes[(first != g) & (second != g)]) for g in groups])


def _middle(ordered: np.ndarray) -> float:
    """Median of what is sorted."""
    n = len(ordered)
    return float((ordered[(n - 1) // 2] + ordered[n // 2]) / 2) if n else np.nan
