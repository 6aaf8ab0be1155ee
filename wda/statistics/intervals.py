"""95 % intervals from a bootstrap that resamples layers, and runs where there are several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from wda.statistics.clouds import Cloud
from wda.statistics.moments import Estimate
from wda.statistics.resampling import (
    FEWEST_LAYERS,
    Sampled,
    jackknife_variance,
    layer_resamples,
    on_top,
    sample,
)

LEVEL = 0.95


class Interval(NamedTuple):
    """Where the estimate lies with 95 % confidence; NaN where that is not known."""

    low: float
    high: float


NO_INTERVAL = Interval(np.nan, np.nan)


def interval(estimate: Estimate) -> Interval:
    """Give the 95 % interval of an estimate; NaN with too few layers.

    The bootstrap of (θ* − θ)/se*, with standard errors from a jackknife over the layers, gives the
    quantiles; where Student's t with layers − 1 degrees of freedom has the wider ones, those are
    taken, since few layers give few different resamples.
    """
    runs, layers = estimate.sums.shape[1:]
    if layers < FEWEST_LAYERS:
        return NO_INTERVAL
    _, whole, drawn = sample(estimate)
    freedom = _freedom((whole.of_layers[0], layers - 1), (whole.of_runs[0], runs - 1))
    error = float(_error(whole.of_layers, whole.of_runs)[0])
    errors = _error(drawn.of_layers, drawn.of_runs)
    centre = float(whole.estimate[0])
    low, high = _studentised(centre, error, drawn.estimate, errors, freedom)
    if estimate.is_correlation:
        return Interval(float(np.tanh(low)), float(np.tanh(high)))
    return Interval(low * estimate.unit, high * estimate.unit)


def difference(a: Sampled, b: Sampled) -> tuple[float, Interval]:
    """Give a − b, of runs or methods that have the same layers, and its 95 % interval.

    The interval is that of :func:`interval`, of the difference on the estimates' own scale: both
    are resampled in the same layers, so what a layer does to both cancels out.
    """
    unit_a, unit_b = a.estimate.unit, b.estimate.unit
    runs_a, runs_b = (x.estimate.sums.shape[1] for x in (a, b))
    layers = a.whole.without_layer.shape[1]
    value = float(unit_a * a.whole.estimate[0] - unit_b * b.whole.estimate[0])
    if layers < FEWEST_LAYERS:
        return value, NO_INTERVAL

    def of_layers(a: np.ndarray, b: np.ndarray, times: np.ndarray) -> np.ndarray:
        return jackknife_variance(unit_a * a - unit_b * b, times)

    once = np.ones((1, layers))
    whole = of_layers(a.whole.without_layer, b.whole.without_layer, once)
    drawn = of_layers(a.drawn.without_layer, b.drawn.without_layer, layer_resamples(layers))
    of_a, of_b = unit_a**2 * a.whole.of_runs, unit_b**2 * b.whole.of_runs
    freedom = _freedom((whole[0], layers - 1), (of_a[0], runs_a - 1), (of_b[0], runs_b - 1))
    errors = _error(drawn, unit_a**2 * a.drawn.of_runs + unit_b**2 * b.drawn.of_runs)
    values = unit_a * a.drawn.estimate - unit_b * b.drawn.estimate
    error = float(_error(whole, of_a + of_b)[0])
    return value, _studentised(value, error, values, errors, freedom)


def student_interval(centre: float, without: Sequence[np.ndarray]) -> Interval:
    """Give the interval of an estimate too slow to resample: Student's t and a jackknife alone.

    Parameters
    ----------
    centre : float
        The estimate.
    without : sequence of numpy.ndarray
        The estimate without each of the :func:`groupings` in turn.

    Returns
    -------
    Interval
        NaN with too few layers, or where an estimate is not determined.
    """
    layers = len(without[0])
    if layers < FEWEST_LAYERS:
        return NO_INTERVAL
    variances = [jackknife_variance(x[None], np.ones((1, len(x)))) for x in without]
    of_layers, of_runs, runs = variances[0], np.zeros(1), 1
    if len(variances) > 1:
        of_runs, runs = on_top(variances[0], variances[1], variances[2]), len(without[1])
    freedom = _freedom((of_layers[0], layers - 1), (of_runs[0], runs - 1))
    none = np.empty(0)
    return _studentised(centre, _error(of_layers, of_runs)[0], none, none, freedom)


def groupings(cloud: Cloud) -> list[np.ndarray]:
    """Group points by layer; with several runs also by run, and by layer and run."""
    if cloud.runs == 1:
        return [cloud.layer]
    cells = np.unique(cloud.run * cloud.layers + cloud.layer, return_inverse=True)[1]
    return [cloud.layer, cloud.run, cells]


def _studentised(
    centre: float, error: float, drawn: np.ndarray, errors: np.ndarray, freedom: float
) -> Interval:
    """Give the interval of an estimate from resamples of it and their standard errors."""
    if not np.isfinite(centre) or not np.isfinite(error):
        return NO_INTERVAL
    tail = (1 - LEVEL) / 2
    wide = float(stats.t.ppf(1 - tail, freedom))
    with np.errstate(divide="ignore", invalid="ignore"):
        distances = (drawn - centre) / errors
    distances = distances[np.isfinite(distances)]
    low, high = np.quantile(distances, [tail, 1 - tail]) if len(distances) else (0.0, 0.0)
    return Interval(
        float(centre - max(high, wide) * error), float(centre - min(low, -wide) * error)
    )


def _error(of_layers: np.ndarray, of_runs: np.ndarray) -> np.ndarray:
    error: np.ndarray = np.sqrt(of_layers + of_runs)
    return error


def _freedom(*parts: tuple[float, int]) -> float:
    """Degrees of freedom of a sum of variances, each with its own (Satterthwaite)."""
    total = sum(variance for variance, _ in parts)
    each = sum(variance**2 / freedom for variance, freedom in parts if variance > 0)
    return float(total**2 / each) if each > 0 else float(parts[0][1])
