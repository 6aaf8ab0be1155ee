"""The slope with a random intercept for each matrix of a layer."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar

from wda.statistics.clouds import Cloud
from wda.statistics.intervals import NO_INTERVAL, Interval, groupings, student_interval

# Logarithms of the variance ratios searched: from none of the variance to all of it.
_SEARCHED = np.linspace(-16, 16, 65)
_TINY = np.finfo(float).tiny


def mixed_slope(cloud: Cloud) -> tuple[float, Interval]:
    """Estimate the slope by restricted maximum likelihood, and its interval.

    NaN where it is not determined: with one point per matrix, its intercept and its scatter are
    one.
    """
    if np.bincount(cloud.unit).max() < 2:
        return np.nan, NO_INTERVAL
    sums = unit_sums(cloud)
    first = np.unique(cloud.unit, return_index=True)[1]
    value = fit_mixed(sums)[0]
    without = [
        np.array([fit_mixed(sums[:, groups != g])[0] for g in range(groups.max() + 1)])
        for groups in (grouping[first] for grouping in groupings(cloud))
    ]
    spread_x, spread_y = cloud.spread()
    unit = spread_y / spread_x
    low, high = student_interval(value, without)
    return unit * value, Interval(unit * low, unit * high)


def unit_sums(cloud: Cloud) -> np.ndarray:
    """Give n, the means of x and y and the sums xx, xy, yy about them: (6, matrices)."""
    n = np.bincount(cloud.unit).astype(float)
    x, y = cloud.standardised()
    mean_x, mean_y = (np.bincount(cloud.unit, values) / n for values in (x, y))
    x, y = x - mean_x[cloud.unit], y - mean_y[cloud.unit]
    about = [np.bincount(cloud.unit, values) for values in (x * x, x * y, y * y)]
    return np.stack([n, mean_x, mean_y, *about])


def fit_mixed(sums: np.ndarray) -> tuple[float, float]:
    """Fit y = slope·x + intercept of the matrix, which is normal.

    Parameters
    ----------
    sums : numpy.ndarray
        Of :func:`unit_sums`.

    Returns
    -------
    slope, ratio : float
        The slope, and the variance of the intercepts in units of the residual variance. The
        likelihood, maximised over all else, depends on the ratio alone, through these sums;
        statsmodels' MixedLM finds the same a hundred times slower.
    """
    n, mean_x, mean_y, *about = sums
    within = np.sum(about, axis=1)[:, None]
    means = np.stack([np.ones_like(n), mean_x, mean_y])
    products = np.stack([mean_x * mean_x, mean_x * mean_y, mean_y * mean_y])

    def moments(ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Weighted n and sums about the weighted means, for each ratio."""
        weight = n[:, None] / (1 + n[:, None] * ratio)
        one, x, y = means @ weight
        xx, xy, yy = within + products @ weight - np.stack([x * x, x * y, y * y]) / one
        return one, xx, xy, yy

    def deviance(log_ratio: np.ndarray) -> np.ndarray:
        """Minus twice the restricted log-likelihood, but for a constant."""
        ratio = np.exp(log_ratio)
        one, xx, xy, yy = moments(ratio)
        xx = np.maximum(xx, _TINY)
        rest = (n.sum() - 2) * np.log(np.maximum(yy - xy * xy / xx, _TINY))
        grown = np.log(1 + n[:, None] * ratio).sum(axis=0)
        total: np.ndarray = rest + grown + np.log(one) + np.log(xx)
        return total

    best = int(np.argmin(deviance(_SEARCHED)))
    around = _SEARCHED[max(best - 1, 0)], _SEARCHED[min(best + 1, len(_SEARCHED) - 1)]
    found = minimize_scalar(lambda x: deviance(np.array([x]))[0], bounds=around, method="bounded")
    ratio = float(np.exp(found.x))
    _, xx, xy, _ = moments(np.array([ratio]))
    return (float(xy[0] / xx[0]) if xx[0] > _TINY else np.nan), ratio
