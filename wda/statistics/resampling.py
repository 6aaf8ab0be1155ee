"""95 % intervals from a bootstrap that resamples layers, and runs where there are several.

Layers of one run are what repeats; the checkpoints of a layer are not independent of each other, so
all points of a layer go into a resample together. Runs and layers cross: a resample takes run r u_r
times and layer c v_c times, and so the points of both u_r·v_c times.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import stats

from wda.statistics.clouds import Cloud
from wda.statistics.moments import Estimate

RESAMPLES = 1999
FEWEST_LAYERS = 5
LEVEL = 0.95
_SEED = 20240214
# Resamples of fewer different layers or runs say nothing of how different they are.
_FEWEST_DISTINCT = 3
_BATCH = 500  # resamples at a time, to bound the memory


class Interval(NamedTuple):
    """Where the estimate lies with 95 % confidence; NaN where that is not known."""

    low: float
    high: float


NO_INTERVAL = Interval(np.nan, np.nan)


class Jackknife(NamedTuple):
    """An estimate on its scale (Fisher's z for a correlation), and how certain it is.

    Arrays have one number per resample, `without_layer` one more axis for the layers.
    """

    estimate: np.ndarray
    error: np.ndarray
    freedom: np.ndarray
    without_layer: np.ndarray


def interval(estimate: Estimate) -> Interval:
    """Give the 95 % interval of an estimate.

    The bootstrap of (θ* − θ)/se*, with standard errors from a jackknife over the layers, gives the
    quantiles; where Student's t with layers − 1 degrees of freedom has the wider ones, those are
    taken, since few layers give few different resamples.
    """
    runs, layers = estimate.sums.shape[1:]
    if layers < FEWEST_LAYERS:
        return NO_INTERVAL
    whole = jackknife_of_all(estimate)
    centre, error = whole.estimate[0], whole.error[0]
    if not np.isfinite(centre) or not np.isfinite(error):
        return NO_INTERVAL
    u, v = resamples(runs, layers)
    batches = range(0, len(v), _BATCH)
    drawn = [jackknife(estimate, u[i : i + _BATCH], v[i : i + _BATCH]) for i in batches]
    with np.errstate(divide="ignore", invalid="ignore"):
        studentised = np.concatenate([(d.estimate - centre) / d.error for d in drawn])
    ends = _envelope(studentised[np.isfinite(studentised)], whole.freedom[0])
    return _on_its_scale(estimate, centre, error, *ends)


class Sampled(NamedTuple):
    """An estimate, its interval, and what its jackknife gives."""

    value: float
    ends: Interval
    jackknife: Jackknife


def sample(estimate: Estimate) -> Sampled:
    """Estimate once what may be subtracted from several others."""
    return Sampled(estimate.value(), interval(estimate), jackknife_of_all(estimate))


def difference(a: Sampled, b: Sampled) -> tuple[float, Interval]:
    """Give a − b, of two runs or methods that have the same layers, and its 95 % interval.

    The two intervals are put together as Zou (2007) does, which keeps their skewness; how the two
    estimates go together from layer to layer is taken from the jackknife.
    """
    together = _correlation_over_layers(a.jackknife, b.jackknife)

    def reach(one: float, other: float) -> float:
        return float(np.sqrt(max(one**2 + other**2 - 2 * together * one * other, 0.0)))

    value = a.value - b.value
    down, up = a.value - a.ends.low, a.ends.high - a.value
    other_down, other_up = b.value - b.ends.low, b.ends.high - b.value
    return value, Interval(value - reach(down, other_up), value + reach(up, other_down))


def _correlation_over_layers(a: Jackknife, b: Jackknife) -> float:
    """Correlation of two estimates of the same layers."""
    one, other = (j.without_layer[0] - j.without_layer[0].mean() for j in (a, b))
    covariance = (1 - 1 / len(one)) * (one @ other)
    errors = float(a.error[0] * b.error[0])
    return float(np.clip(covariance / errors, -1, 1)) if errors else 0.0


def student_interval(centre: float, without: Sequence[np.ndarray]) -> Interval:
    """Give the interval of an estimate too slow to resample: Student's t and a jackknife alone.

    Parameters
    ----------
    centre : float
        The estimate.
    without : sequence of numpy.ndarray
        The estimate without each layer; with several runs also without each run, and without the
        points of each run and layer.

    Returns
    -------
    Interval
        NaN with too few layers, or where an estimate is not determined.
    """
    layers = len(without[0])
    if layers < FEWEST_LAYERS:
        return NO_INTERVAL
    variance, *others = (_variance(x[None], np.ones((1, len(x)))) for x in without)
    freedom = np.array([layers - 1.0])
    if others:
        variance, freedom = _add_up(variance, others[0], others[1], len(without[1]), layers)
    reach = float((stats.t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(variance))[0])
    return Interval(centre - reach, centre + reach)


def groupings(cloud: Cloud) -> list[np.ndarray]:
    """Give the groups of points that a jackknife leaves out: as :func:`student_interval` has it."""
    if cloud.runs == 1:
        return [cloud.layer]
    cells = np.unique(cloud.run * cloud.layers + cloud.layer, return_inverse=True)[1]
    return [cloud.layer, cloud.run, cells]


def _envelope(studentised: np.ndarray, freedom: float) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    wide = float(stats.t.ppf(1 - tail, freedom))
    if not len(studentised):
        return -wide, wide
    low, high = np.quantile(studentised, [tail, 1 - tail])
    return min(low, -wide), max(high, wide)


def _on_its_scale(
    estimate: Estimate, centre: float, error: float, low: float, high: float
) -> Interval:
    ends = np.array([centre - high * error, centre - low * error])
    ends = np.tanh(ends) if estimate.is_correlation else ends * estimate.unit
    return Interval(*map(float, ends))


@lru_cache(maxsize=64)
def resamples(runs: int, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw how often each run and each layer is taken: (resamples, runs), (resamples, layers)."""
    random = np.random.default_rng([_SEED, runs, layers])
    u = random.multinomial(runs, np.full(runs, 1 / runs), RESAMPLES)
    v = random.multinomial(layers, np.full(layers, 1 / layers), RESAMPLES)
    enough = ((u > 0).sum(axis=1) >= min(runs, 2)) & ((v > 0).sum(axis=1) >= _FEWEST_DISTINCT)
    return u[enough].astype(float), v[enough].astype(float)


def jackknife_of_all(estimate: Estimate) -> Jackknife:
    """Estimate and standard error of the points as they are, as of one resample."""
    runs, layers = estimate.sums.shape[1:]
    return jackknife(estimate, np.ones((1, runs)), np.ones((1, layers)))


def jackknife(estimate: Estimate, u: np.ndarray, v: np.ndarray) -> Jackknife:
    """Estimate and standard error of each resample, leaving out each layer (and run) in turn.

    With several runs the squared errors of layers and runs add up, less that of single points of
    both, which both hold (Cameron, Gelbach and Miller 2011).
    """
    runs, layers = u.shape[1], v.shape[1]
    totals = estimate.totals(v)
    without = estimate.totals_without_each(v)

    def scaled(sums: np.ndarray) -> np.ndarray:
        values = estimate.formula(sums)
        return _fisher(values) if estimate.is_correlation else values

    whole = scaled(np.einsum("mbr,br->mb", totals, u))
    without_layer = scaled(np.einsum("mbrc,br->mbc", without, u))
    of_layers = _variance(without_layer, v)
    if runs == 1:
        return Jackknife(whole, np.sqrt(of_layers), np.full(len(v), layers - 1.0), without_layer)
    all_runs = np.einsum("mbr,br->mb", totals, u)[..., None]
    of_runs = _variance(scaled(all_runs - totals), u)
    cells = (len(v), runs * layers)
    without_cell = scaled((all_runs - totals)[..., None] + without).reshape(cells)
    of_cells = _variance(without_cell, (u[:, :, None] * v[:, None, :]).reshape(cells))
    variance, freedom = _add_up(of_layers, of_runs, of_cells, runs, layers)
    return Jackknife(whole, np.sqrt(variance), freedom, without_layer)


def _add_up(
    of_layers: np.ndarray, of_runs: np.ndarray, of_cells: np.ndarray, runs: int, layers: int
) -> tuple[np.ndarray, np.ndarray]:
    """Variance of crossed layers and runs, and its degrees of freedom by Satterthwaite."""
    total = np.maximum(np.maximum(of_layers, of_runs), of_layers + of_runs - of_cells)
    beyond = total - of_layers
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = total**2 / (of_layers**2 / (layers - 1) + beyond**2 / (runs - 1))
    return total, np.where(total > 0, freedom, layers - 1.0)


def _variance(without: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Jackknife variance from estimates without one, where each stands so many times."""
    n = times.sum(axis=1, keepdims=True)
    without = np.where(times > 0, without, 0)
    mean = (times * without).sum(axis=1, keepdims=True) / n
    variance: np.ndarray = ((n - 1) / n * times * (without - mean) ** 2).sum(axis=1)
    return variance


def _fisher(r: np.ndarray) -> np.ndarray:
    """Fisher's z, of r no closer to ±1 than rounding lets it be told."""
    nearest = 1 - 1e-12
    z: np.ndarray = np.arctanh(np.clip(r, -nearest, nearest))
    return z
