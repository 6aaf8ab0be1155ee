"""The slope with a random intercept for each matrix of a layer."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar

from wda.statistics.clouds import Cloud
from wda.statistics.moments import Estimate, mixed

# Logarithms of the variance ratios searched: from none of the variance to all of it.
_SEARCHED = np.linspace(-16, 16, 65)


def mixed_slope(cloud: Cloud) -> Estimate | None:
    """Estimate the slope by restricted maximum likelihood; None where that is not determined.

    Its interval keeps the variance ratio as found: near the truth the slope hardly depends on it,
    and a search of its own for every resample would take minutes.
    """
    sizes = np.bincount(cloud.unit)
    if len(sizes) < 2 or sizes.max() < 2:
        return None  # with one point per matrix, its intercept and its scatter are one
    return mixed(cloud, _variance_ratio(cloud))


def _variance_ratio(cloud: Cloud) -> float:
    """Variance of the intercepts in units of the residual variance.

    With one random intercept the likelihood, maximised over all else, depends on this number alone,
    through sums per matrix; statsmodels' MixedLM finds the same a hundred times slower.
    """
    n = np.bincount(cloud.unit).astype(float)
    x, y = cloud.standardised()
    mean_x, mean_y = (np.bincount(cloud.unit, values) / n for values in (x, y))
    from_x, from_y = x - mean_x[cloud.unit], y - mean_y[cloud.unit]
    within = np.array([from_x @ from_x, from_x @ from_y, from_y @ from_y])
    means = np.stack([np.ones_like(n), mean_x, mean_y])
    products = np.stack([mean_x * mean_x, mean_x * mean_y, mean_y * mean_y])

    def deviance(log_ratio: float) -> float:
        """Minus twice the restricted log-likelihood, but for a constant."""
        grown = 1 + n * np.exp(log_ratio)
        weight = n / grown
        one, x1, y1 = means @ weight
        xx, xy, yy = within + products @ weight - np.array([x1 * x1, x1 * y1, y1 * y1]) / one
        rest = max(yy - xy * xy / xx, np.finfo(float).tiny) if xx > 0 else yy
        fixed = np.log(one) + np.log(max(xx, np.finfo(float).tiny))
        return float((len(x) - 2) * np.log(rest) + np.log(grown).sum() + fixed)

    best = int(np.argmin([deviance(log_ratio) for log_ratio in _SEARCHED]))
    around = _SEARCHED[max(best - 1, 0)], _SEARCHED[min(best + 1, len(_SEARCHED) - 1)]
    return float(np.exp(minimize_scalar(deviance, bounds=around, method="bounded").x))
