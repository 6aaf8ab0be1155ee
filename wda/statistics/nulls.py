"""Where r and slope lie among those of random updates of the measured size."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from wda.draws import Draws
from wda.statistics.clouds import Cloud

SEVERAL = "several ranks"
_LEVEL = 0.95
_BATCH = 64  # draws at a time, to bound the memory


def null_band(draws: Draws, cloud: Cloud, found: Mapping[str, float]) -> dict[str, object]:
    """Set r, r between layers and slope of a cloud beside those of the draws of its points.

    Parameters
    ----------
    draws : Draws
        Of the rows that are the points of the cloud, in their order.
    cloud : Cloud
        The points.
    found : mapping
        The estimates of what was measured, by their names.

    Returns
    -------
    dict
        The ``null…`` columns of the statistics. The p-values count the measured one among the
        draws, so that they are never 0: twice (k + 1)/(draws + 1), at most 1, where k draws lie as
        far out on the same side (Phipson and Smyth 2010).
    """
    of_r, of_slope = fit_columns(draws.delta_d, draws.delta_m)
    names = np.unique(draws.null)
    row: dict[str, object] = {"null": names[0] if len(names) == 1 else SEVERAL}
    between = _between_layers(draws, cloud)
    for name, p, measured, drawn in (
        ("null_r", "null_p", "pearson_r", of_r),
        ("null_between_r", "null_between_p", "between_layer_r", between),
        ("null_slope", "null_slope_p", "slope", of_slope),
    ):
        low, high, share = _beside(found.get(measured, np.nan), drawn[np.isfinite(drawn)])
        row |= {f"{name}_low": low, f"{name}_high": high, p: share}
    return row


def _between_layers(draws: Draws, cloud: Cloud) -> np.ndarray:
    """Correlate the means of each matrix, less those of its label, in every draw."""
    _, first = np.unique(cloud.unit, return_index=True)
    label = cloud.label[first]
    x, y = (_means(values, cloud.unit) for values in (draws.delta_d, draws.delta_m))
    return fit_columns(x - _means(x, label)[label], y - _means(y, label)[label])[0]


def _means(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Average (points, draws) over groups that are counted from 0."""
    belongs = np.eye(group.max() + 1)[:, group]
    means: np.ndarray = (belongs @ values) / belongs.sum(axis=1, keepdims=True)
    return means


def fit_columns(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give r and slope of every column: (points, draws) → (draws,) each."""
    parts = [
        _line(x[:, i : i + _BATCH], y[:, i : i + _BATCH]) for i in range(0, x.shape[1], _BATCH)
    ]
    r, slope = (np.concatenate(values) for values in zip(*parts, strict=True))
    return r, slope


def _line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    xx, xy, yy = (np.einsum("pd,pd->d", a, b) for a, b in ((x, x), (x, y), (y, y)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return xy / np.sqrt(xx * yy), xy / xx


def _beside(measured: float, drawn: np.ndarray) -> tuple[float, float, float]:
    """Give the band of the draws and the two-sided p of what was measured."""
    if not len(drawn):
        return np.nan, np.nan, np.nan
    low, high = np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    if np.isnan(measured):
        return float(low), float(high), np.nan
    beyond = min((drawn <= measured).sum(), (drawn >= measured).sum())
    return float(low), float(high), min(1.0, 2 * (int(beyond) + 1) / (len(drawn) + 1))
