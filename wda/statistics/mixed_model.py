"""The slope with a random intercept for each matrix of a layer."""

from __future__ import annotations

import warnings

import numpy as np

from wda.statistics.clouds import Cloud
from wda.statistics.moments import Estimate, mixed


def mixed_slope(cloud: Cloud) -> Estimate | None:
    """Estimate the slope by restricted maximum likelihood; None where that does not settle.

    Its interval keeps the variance ratio as found: near the truth the slope hardly depends on it,
    and a search of its own for every resample would take minutes.
    """
    sizes = np.bincount(cloud.unit)
    if len(sizes) < 2 or sizes.max() < 2:
        return None  # with one point per matrix, its intercept and its scatter are one
    ratio = _variance_ratio(cloud)
    return None if ratio is None else mixed(cloud, ratio)


def _variance_ratio(cloud: Cloud) -> float | None:
    """Variance of the intercepts in units of the residual variance."""
    # It takes a second to import, which only those pay who fit.
    from statsmodels.regression.mixed_linear_model import MixedLM  # noqa: PLC0415

    x, y = cloud.standardised()
    model = MixedLM(y, np.column_stack([np.ones_like(x), x]), groups=cloud.unit)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = model.fit(reml=True)
    except (np.linalg.LinAlgError, ValueError, ZeroDivisionError):
        return None
    ratio = float(found.cov_re[0, 0]) / float(found.scale) if found.scale > 0 else np.inf
    return ratio if found.converged and np.isfinite(ratio) else None
