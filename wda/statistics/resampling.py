"""Estimates of resamples, and their standard errors by a jackknife.

Layers of one run are what repeats; the checkpoints of a layer are not independent of each other, so
all points of a layer go into a resample together. Runs and layers cross: a resample takes run r u_r
times and layer c v_c times, and so the points of both u_r·v_c times.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from wda.statistics.moments import Estimate

RESAMPLES = 1999
FEWEST_LAYERS = 5  # that an interval takes
_SEED = 20240214
# Resamples of fewer different layers or runs say nothing of how different they are.
_DIFFERENT_LAYERS, _DIFFERENT_RUNS = 4, 2
_BATCH = 500  # resamples at a time, to bound the memory


class Jackknife(NamedTuple):
    """Estimates on their scale (Fisher's z for a correlation), and how certain they are.

    Attributes
    ----------
    estimate : numpy.ndarray
        Shape (resamples,).
    of_layers, of_runs : numpy.ndarray
        Their variance from layer to layer, and what comes on top from run to run.
    without_layer : numpy.ndarray
        The estimates without each layer: (resamples, layers).
    """

    estimate: np.ndarray
    of_layers: np.ndarray
    of_runs: np.ndarray
    without_layer: np.ndarray


class Sampled(NamedTuple):
    """An estimate from all points, and from each resample; none of these with too few layers."""

    estimate: Estimate
    whole: Jackknife
    drawn: Jackknife


def sample(estimate: Estimate) -> Sampled:
    """Estimate from all points and from resamples."""
    runs, layers = estimate.sums.shape[1:]
    whole = jackknife(estimate, np.ones((1, runs)), np.ones((1, layers)))
    if layers < FEWEST_LAYERS:
        return Sampled(estimate, whole, Jackknife(*(part[:0] for part in whole)))
    v = layer_resamples(layers)
    u = _run_resamples(runs, len(v))
    batches = range(0, len(v), _BATCH)
    drawn = [jackknife(estimate, u[i : i + _BATCH], v[i : i + _BATCH]) for i in batches]
    return Sampled(estimate, whole, Jackknife(*map(np.concatenate, zip(*drawn, strict=True))))


@lru_cache(maxsize=64)
def layer_resamples(layers: int) -> np.ndarray:
    """Draw how often each layer is taken, always the same: (resamples, layers)."""
    random = np.random.default_rng([_SEED, layers])
    v = random.multinomial(layers, np.full(layers, 1 / layers), RESAMPLES)
    return np.asarray(v[(v > 0).sum(axis=1) >= _DIFFERENT_LAYERS], float)


def _run_resamples(runs: int, resamples: int) -> np.ndarray:
    """Draw how often each run is taken, always the same: (resamples, runs)."""
    if runs == 1:
        return np.ones((resamples, 1))
    random = np.random.default_rng([_SEED, runs, 0])
    # Of two runs half the draws have both, of more runs most.
    u = random.multinomial(runs, np.full(runs, 1 / runs), 4 * resamples)
    return np.asarray(u[(u > 0).sum(axis=1) >= _DIFFERENT_RUNS][:resamples], float)


def jackknife(estimate: Estimate, u: np.ndarray, v: np.ndarray) -> Jackknife:
    """Estimate each resample, and its variance by leaving out each layer (and run) in turn."""
    runs, layers = u.shape[1], v.shape[1]
    totals = estimate.totals(v)
    without = estimate.totals_without_each(v)

    def scaled(sums: np.ndarray) -> np.ndarray:
        values = estimate.formula(sums)
        return _fisher(values) if estimate.is_correlation else values

    all_runs = np.einsum("mbr,br->mb", totals, u)
    without_layer = scaled(np.einsum("mbrc,br->mbc", without, u))
    of_layers = jackknife_variance(without_layer, v)
    of_runs = np.zeros_like(of_layers)
    if runs > 1:
        other_runs = all_runs[..., None] - totals
        without_cell = scaled(other_runs[..., None] + without).reshape(len(v), runs * layers)
        cells = (u[:, :, None] * v[:, None, :]).reshape(without_cell.shape)
        of_runs = on_top(
            of_layers,
            jackknife_variance(scaled(other_runs), u),
            jackknife_variance(without_cell, cells),
        )
    return Jackknife(scaled(all_runs), of_layers, of_runs, without_layer)


def on_top(of_layers: np.ndarray, of_runs: np.ndarray, of_cells: np.ndarray) -> np.ndarray:
    """Give what runs add to the variance of layers.

    The variances of layers and runs add up, less that of the points of one layer and run, which
    both hold (Cameron, Gelbach and Miller 2011); and the sum is no less than either.
    """
    return np.asarray(np.maximum(np.maximum(of_runs - of_cells, of_runs - of_layers), 0))


def jackknife_variance(without: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Variance from estimates without one, where each stands so many times: (resamples,)."""
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
