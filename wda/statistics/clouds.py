"""Rows of a table → the points of one fit, and which layer, step and run each belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from wda.statistics.columns import ALL
from wda.statistics.lines import is_constant, rounding


@dataclass(frozen=True)
class Cloud:
    """The points of one fit. Everything has one number per point; groups are counted from 0.

    Attributes
    ----------
    x, y : numpy.ndarray
        ΔD and ΔM.
    run : numpy.ndarray of int
        Which run.
    layer : numpy.ndarray of int
        Which layer: what the intervals resample, so that its points stay together.
    unit : numpy.ndarray of int
        Which matrix of which run, the thing that is followed over the steps.
    at_once : numpy.ndarray of int
        Which step of which run and label: points that differ in their layer alone.
    label : numpy.ndarray of int
        Which label of which run.
    step : numpy.ndarray
        The step; NaN where unknown.
    """

    x: np.ndarray
    y: np.ndarray
    run: np.ndarray
    layer: np.ndarray
    unit: np.ndarray
    at_once: np.ndarray
    label: np.ndarray
    step: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return _count(self.layer)

    @property
    def runs(self) -> int:
        """Number of runs."""
        return _count(self.run)

    @property
    def steps(self) -> int:
        """Number of steps; steps that are not known count as one."""
        return len(np.unique(self.step))

    def why_no_line(self) -> str | None:
        """Say why nothing can be fitted; None where a line can."""
        if len(self) < 3:
            points = "1 point" if len(self) == 1 else f"{len(self)} points"
            return f"{points} with both ΔM and ΔD, fewer than the three a line needs"
        return "ΔD is the same at all points" if is_constant(self.x) else None

    def standardised(self) -> tuple[np.ndarray, np.ndarray]:
        """Give x and y with mean 0 and variance 1, so that sums of squares keep their digits."""
        return _standardised(self.x), _standardised(self.y)

    def spread(self) -> tuple[float, float]:
        """Give the standard deviations of x and y."""
        return float(self.x.std()), float(self.y.std())


def _count(groups: np.ndarray) -> int:
    return int(groups.max()) + 1 if len(groups) else 0


def _standardised(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean()
    centred[np.abs(centred) <= rounding(values)] = 0
    scaled: np.ndarray = centred / (centred.std() or 1.0)
    return scaled


def make_cloud(rows: pd.DataFrame) -> Cloud:
    """Take rows as points.

    Parameters
    ----------
    rows : pandas.DataFrame
        Rows of a table that have both coordinates, of one run or of several.

    Returns
    -------
    Cloud
        The points in the order of the rows.
    """
    run, label, step = rows["run"], rows["matrix"], rows["step"].astype("string").fillna("")
    return Cloud(
        rows["delta_d"].to_numpy(float),
        rows["delta_m"].to_numpy(float),
        _codes(run),
        _codes(layer_names(rows)),
        _codes(run, unit_names(rows)),
        _codes(run, label, step),
        _codes(run, label),
        rows["step"].to_numpy(float, na_value=np.nan),
    )


def has_both(rows: pd.DataFrame) -> np.ndarray:
    """Tell which rows have both coordinates."""
    both: np.ndarray = np.isfinite(rows[["delta_d", "delta_m"]].to_numpy(float)).all(axis=1)
    return both


def layer_names(rows: pd.DataFrame) -> pd.Series:
    """Name each row's layer, the same in every run of a base.

    It is the number with the path before it, for an encoder's layer 0 is not the decoder's. Outside
    the layers each module stands for itself.
    """
    path = rows["module"].str.extract(r"^((?:.*?\.)?)\d+(?:\.|$)", expand=False).fillna("")
    return (path + rows["layer"].astype("string")).fillna(rows["module"])


def unit_names(rows: pd.DataFrame) -> pd.Series:
    """Name each row's matrix of the base, and its head where there is one."""
    return rows["module"] + " " + rows["head"].astype("string").fillna("")


def _codes(*keys: pd.Series) -> np.ndarray:
    """Give each row the number of its keys, in an order that the rows' does not decide."""
    frame = pd.concat(keys, axis=1, keys=range(len(keys)))
    return frame.groupby(list(frame.columns), sort=True, dropna=False).ngroup().to_numpy()


@dataclass(frozen=True)
class Selection:
    """The rows of one fit, by their positions in the table, and what they have in common."""

    positions: np.ndarray
    run: str | None
    method: str
    runs: int
    matrix: str
    per: str
    granularity: str | None


def select(table: pd.DataFrame) -> Iterator[Selection]:
    """Give the rows of every fit: runs as they come, then methods that have several runs.

    Vectors of another axis or granularity are other vectors, so each is fitted by itself.
    """
    rows = table.reset_index(drop=True)
    kinds = ["method", "per", "granularity"]
    for run, of_run in rows.groupby("run", sort=False):
        for _, alike in of_run.groupby(kinds, sort=False, dropna=False):
            yield from _by_label(alike, str(run))
    for _, alike in rows.groupby(kinds, sort=False, dropna=False):
        if alike["run"].nunique() > 1:
            yield from _by_label(alike, None)


def _by_label(rows: pd.DataFrame, run: str | None) -> Iterator[Selection]:
    """Give the rows of every label, then all of them."""
    positions, first = rows.index.to_numpy(), rows.iloc[0]
    kind = first["method"], rows["run"].nunique()
    vectors = first["per"], None if pd.isna(first["granularity"]) else first["granularity"]
    for label in [*dict.fromkeys(rows["matrix"]), ALL]:
        chosen = positions if label == ALL else positions[(rows["matrix"] == label).to_numpy()]
        yield Selection(chosen, run, *kind, label, *vectors)
