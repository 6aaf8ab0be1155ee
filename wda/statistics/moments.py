"""Correlations and slopes from sums per layer, so that thousands of resamples are a few products.

A resample takes layer c v_c times, so its sums are Σ_c v_c·(sum over the points of layer c). Where
a mean that is taken off spans the layers, as that of a checkpoint does, it is another one in every
resample: then the centred sum is Σ_c v_c·Q_c − Σ_g (Σ_c v_c·a_gc)(Σ_c v_c·b_gc)/(Σ_c v_c·n_gc) over
the groups g. Groups with the same counts n share their denominator, and so one form v·K·v.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from wda.statistics.clouds import Cloud
from wda.statistics.lines import rounding

Formula = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class _Centring:
    """Means over groups of one run that have the same number of points in each layer."""

    run: int
    counts: np.ndarray  # (layers,)
    products: np.ndarray  # (sums, layers, layers), symmetric


@dataclass(frozen=True)
class Estimate:
    """A number that follows from sums, which are known for every run and layer.

    Attributes
    ----------
    sums : numpy.ndarray
        Shape (sums, runs, layers).
    formula : callable
        From an array (sums, …) to the estimate (…), NaN where it is not determined.
    is_correlation : bool
        Whether it lies between −1 and 1, and not on the scale of `unit`.
    unit : float
        What to multiply it with.
    centrings : sequence
        The means to take off anew in every resample.
    """

    sums: np.ndarray
    formula: Formula
    is_correlation: bool = True
    unit: float = 1.0
    centrings: Sequence[_Centring] = ()

    def value(self) -> float:
        """Give the estimate from all points."""
        totals = self.totals(np.ones((1, self.sums.shape[2])))
        return float(self.formula(totals.sum(axis=2))[0]) * self.unit

    def totals(self, v: np.ndarray) -> np.ndarray:
        """Sum over the layers, each v times: (resamples, layers) → (sums, resamples, runs)."""
        totals: np.ndarray = np.einsum("bc,mrc->mbr", v, self.sums, optimize=True)
        for centring in self.centrings:
            inner = (v @ centring.products * v).sum(axis=-1)
            totals[:, :, centring.run] -= _ratio(inner, v @ centring.counts)
        return totals

    def totals_without_each(self, v: np.ndarray) -> np.ndarray:
        """Sum with one layer fewer, for each layer: (sums, resamples, runs, layers)."""
        every = np.einsum("bc,mrc->mbr", v, self.sums, optimize=True)
        totals: np.ndarray = every[..., None] - self.sums[:, None]
        for centring in self.centrings:
            products = centring.products
            half = v @ products
            inner = (half * v).sum(axis=-1)[..., None] - 2 * half
            inner += np.diagonal(products, axis1=1, axis2=2)[:, None]
            counts = (v @ centring.counts)[:, None] - centring.counts
            totals[:, :, centring.run] -= _ratio(inner, counts)
        return totals


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Divide where there is something to divide by; empty groups add nothing."""
    ratio: np.ndarray = np.divide(above, below, out=np.zeros_like(above), where=below > 0.5)
    return ratio


def pooled(cloud: Cloud) -> tuple[Estimate, Estimate]:
    """Pearson's r and the least-squares slope over all points."""
    x, y = cloud.standardised()
    one = np.ones(len(cloud))
    sums = _sums(cloud, one, x, y, x * x, x * y, y * y)
    least = _least(cloud)
    unit = _slope_unit(cloud)
    return (
        Estimate(sums, lambda s: _correlation(_centred(s), least)),
        Estimate(sums, lambda s: _slope(_centred(s), least), False, unit),
    )


def ranked(cloud: Cloud, ranks_x: np.ndarray, ranks_y: np.ndarray) -> Estimate:
    """Spearman's r: Pearson's r of the ranks, which resamples keep."""
    x, y = (2 * ranks / len(cloud) - 1 for ranks in (ranks_x, ranks_y))
    sums = _sums(cloud, np.ones(len(cloud)), x, y, x * x, x * y, y * y)
    return Estimate(sums, lambda s: _correlation(_centred(s), (1e-12, 1e-12)))


def within_layers(cloud: Cloud) -> Estimate:
    """Correlation of what is left when each matrix's mean over its checkpoints is taken off."""
    x, y = (_less_means(values, cloud.unit) for values in cloud.standardised())
    least = _least(cloud)
    return Estimate(_sums(cloud, x * x, x * y, y * y), lambda s: _correlation(s, least))


def between_layers(cloud: Cloud) -> Estimate:
    """Correlation of the means of each matrix, less those of all matrices of its label."""
    units, first = np.unique(cloud.unit, return_index=True)
    x, y = (_means(values, cloud.unit) for values in cloud.standardised())
    places = cloud.label[first], cloud.run[first], cloud.layer[first]
    return _grouped(x, y, *places, cloud, _least(cloud, len(units)))


def within_steps(cloud: Cloud) -> Estimate:
    """Correlation of what is left when each checkpoint's mean over its layers is taken off."""
    x, y = cloud.standardised()
    return _grouped(x, y, cloud.at_once, cloud.run, cloud.layer, cloud, _least(cloud))


def given_step(cloud: Cloud) -> Estimate | None:
    """Partial correlation given the step; None where the steps are not known or one."""
    t = cloud.step
    if not np.isfinite(t).all() or np.ptp(t) == 0:
        return None
    t = (t - t.mean()) / t.std()
    x, y = cloud.standardised()
    sums = _sums(cloud, np.ones(len(cloud)), x, y, t, x * x, x * y, y * y, x * t, y * t, t * t)
    least = _least(cloud)
    return Estimate(sums, lambda s: _correlation(_less_line(s), least))


def _sums(cloud: Cloud, *values: np.ndarray) -> np.ndarray:
    """Sum values over the points of each run and layer."""
    cells = cloud.run * cloud.layers + cloud.layer
    shape = (cloud.runs, cloud.layers)
    return np.stack([np.bincount(cells, value, np.prod(shape)).reshape(shape) for value in values])


def _grouped(
    x: np.ndarray,
    y: np.ndarray,
    group: np.ndarray,
    run: np.ndarray,
    layer: np.ndarray,
    cloud: Cloud,
    least: tuple[float, float],
) -> Estimate:
    """Correlation within groups of one run each that span its layers."""
    # The means of all points are taken off first, so that little is left to take off in resamples.
    x, y = _less_means(x, group), _less_means(y, group)
    shape = (cloud.runs, cloud.layers)
    cells = run * cloud.layers + layer
    sums = np.stack(
        [np.bincount(cells, v, np.prod(shape)).reshape(shape) for v in (x * x, x * y, y * y)]
    )
    groups = int(group.max()) + 1
    places = group * cloud.layers + layer

    def per_group(values: np.ndarray) -> np.ndarray:
        flat = np.bincount(places, values, groups * cloud.layers)
        return flat.reshape(groups, cloud.layers)

    counts, a, b = per_group(np.ones(len(x))), per_group(x), per_group(y)
    run_of = np.zeros(groups, int)
    run_of[group] = run
    alike = np.unique(np.column_stack([run_of, counts]), axis=0, return_inverse=True)[1].ravel()
    centrings = []
    for kind in range(alike.max() + 1):
        mine = alike == kind
        cross = a[mine].T @ b[mine]
        products = np.stack([a[mine].T @ a[mine], (cross + cross.T) / 2, b[mine].T @ b[mine]])
        centrings.append(_Centring(int(run_of[mine][0]), counts[mine][0], products))
    return Estimate(sums, lambda s: _correlation(s, least), centrings=centrings)


def _means(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Mean of each group."""
    means: np.ndarray = np.bincount(group, values) / np.bincount(group)
    return means


def _less_means(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    rest: np.ndarray = values - _means(values, group)[group]
    return rest


def _least(cloud: Cloud, n: int | None = None) -> tuple[float, float]:
    """Give the sums of squares of standardised x and y that are no more than rounding."""
    spread = cloud.spread()
    return tuple(  # type: ignore[return-value]
        (n or len(cloud)) * (rounding(values) / (s or 1.0)) ** 2
        for values, s in zip((cloud.x, cloud.y), spread, strict=True)
    )


def _slope_unit(cloud: Cloud) -> float:
    x, y = cloud.spread()
    return y / x if x else np.nan


def _centred(s: np.ndarray) -> np.ndarray:
    """(n, Σx, Σy, Σxx, Σxy, Σyy) → the last three about the means."""
    n, x, y = s[:3]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack([s[3] - x * x / n, s[4] - x * y / n, s[5] - y * y / n])


def _less_line(s: np.ndarray) -> np.ndarray:
    """(n, Σx, Σy, Σt, Σxx, Σxy, Σyy, Σxt, Σyt, Σtt) → (xx, xy, yy) about their lines in t."""
    n, x, y, t, xx, xy, yy, xt, yt, tt = s
    with np.errstate(divide="ignore", invalid="ignore"):
        xx, xy, yy = xx - x * x / n, xy - x * y / n, yy - y * y / n
        xt, yt, tt = xt - x * t / n, yt - y * t / n, tt - t * t / n
        tt = np.where(tt > 1e-12 * n, tt, np.nan)
        return np.stack([xx - xt * xt / tt, xy - xt * yt / tt, yy - yt * yt / tt])


def _correlation(s: np.ndarray, least: tuple[float, float]) -> np.ndarray:
    xx, xy, yy = s
    determined = (xx > least[0]) & (yy > least[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(determined, np.clip(xy / np.sqrt(xx * yy), -1, 1), np.nan)


def _slope(s: np.ndarray, least: tuple[float, float]) -> np.ndarray:
    xx, xy, _ = s
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(xx > least[0], xy / xx, np.nan)
