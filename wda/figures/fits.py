"""The rows of the statistics as a figure shows them: lines, bands and words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from wda import style
from wda.draws import Draws
from wda.errors import TableError
from wda.statistics import correlation as written
from wda.statistics import ends
from wda.statistics.nulls import fit_columns

# More points than this on one Axes are drawn small, and the line above them.
CROWD = 400

# Width of a letter, in the size of its font.
_LETTER = 0.57

# A 95 % interval of draws.
_QUANTILES = (0.025, 0.975)


def fit_of(statistics: pd.DataFrame, run: str, label: str) -> pd.Series:
    """Give the row of the statistics that belongs to a run and label.

    Raises
    ------
    TableError
        When there is none.
    """
    of_run = (statistics["run"] == run).fillna(False)
    rows = statistics[of_run & (statistics["matrix"] == label)]
    if rows.empty:
        raise TableError(
            f"statistics: no row for run {run!r}, matrix {label!r}; compute them from this table"
        )
    return rows.iloc[0]


def number(fit: pd.Series, name: str) -> float:
    """Give a number of a fit; NaN where the statistics do not tell it."""
    value = fit.get(name)
    return np.nan if value is None or pd.isna(value) else float(value)


def interval(fit: pd.Series, low: str, high: str) -> str:
    """Put an interval of r in words; nothing where there is none."""
    numbers = number(fit, low), number(fit, high)
    if not np.isfinite(numbers).all():
        return ""
    return f" [{', '.join(ends(*numbers))}]".replace("-", "−")


def signed(value: float, form: str) -> str:
    """Write a number with its sign, a minus being one."""
    return f"{value:+{form}}".replace("-", "−")


def correlation(r: float) -> str:
    """Write a correlation with its sign."""
    return written(r).replace("-", "−")


def words_of(fit: pd.Series) -> str:
    """Give r with its interval, the slope, and what random updates give, line by line."""
    r, slope = number(fit, "pearson_r"), number(fit, "slope")
    if not np.isfinite(r):
        return f"no r from n = {fit['n']}"
    lines = [
        f"r = {correlation(r)}" + interval(fit, "pearson_r_low", "pearson_r_high"),
        f"slope = {signed(slope, '.3g')}",
    ]
    if random := interval(fit, "null_r_low", "null_r_high"):
        lines.append(f"random:{random}")
    return "\n".join(lines)


def write_above(ax: Axes, text: str) -> None:
    """Write above what is drawn, in room made for it; smaller where the panel is narrow."""
    lines = text.splitlines()
    width = ax.get_window_extent().width * 72 / ax.figure.dpi
    size = min(6.5, max(5.0, width / (_LETTER * max(map(len, lines)))))
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + (0.04 + 0.12 * len(lines)) * (high - low))
    written = ax.text(
        0.03, 0.98, text, va="top", transform=ax.transAxes, fontsize=size, linespacing=1.25,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )  # fmt: skip
    written.set_in_layout(False)  # a word too long may not squeeze the panel


def draw_line(ax: Axes, points: pd.DataFrame, fit: pd.Series, colour: Any, ls: Any = "-") -> None:
    """Draw the least-squares line over the range of the points."""
    if np.isfinite(number(fit, "slope")):
        x = np.array([points["delta_d"].min(), points["delta_d"].max()])
        y = number(fit, "slope") * x + number(fit, "intercept")
        # On top of a crowd of points, told apart from it by its rim.
        rim = [withStroke(linewidth=2, foreground="white")] if len(points) > CROWD else None
        zorder = 3 if rim else 1.5
        ax.plot(x, y, color=colour, lw=1, ls=ls, zorder=zorder, path_effects=rim)


def draw_interval(ax: Axes, points: pd.DataFrame, fit: pd.Series, colour: Any) -> None:
    """Draw the lines between the slope's ends as a band, through the middle of the points.

    Raises
    ------
    TableError
        When the statistics have no interval of the slope.
    """
    if "slope_low" not in fit or "slope_high" not in fit:
        raise TableError(
            "interval: the statistics have no slope_low and slope_high; compute them anew"
        )
    ends = np.array([number(fit, "slope_low"), number(fit, "slope_high")])
    if not np.isfinite(ends).all():
        return
    known = points[["delta_d", "delta_m"]].dropna()
    x = np.linspace(known["delta_d"].min(), known["delta_d"].max(), 3)
    x[1] = known["delta_d"].mean()
    edges = known["delta_m"].mean() + ends[:, None] * (x - x[1])
    ax.fill_between(
        x, edges.min(axis=0), edges.max(axis=0), color=colour, alpha=0.18, lw=0, zorder=1.2
    )


def fits_of(draws: Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit ΔM on ΔD in every draw.

    Returns
    -------
    tuple of numpy.ndarray
        r, slope and intercept, one number per draw; NaN where a draw has none. Rows without
        direction are left out.
    """
    known = np.isfinite(draws.delta_d).all(axis=1)
    x, y = draws.delta_d[known], draws.delta_m[known]
    r, slope = fit_columns(x, y)
    return r, slope, y.mean(axis=0) - slope * x.mean(axis=0)


def draw_null(ax: Axes, draws: Draws) -> None:
    """Draw where the lines of random updates lie: 95 % of the draws, over their own ΔD."""
    _, slope, intercept = fits_of(draws)
    known = np.isfinite(slope)
    if not known.any():
        return
    x = np.linspace(np.nanmin(draws.delta_d), np.nanmax(draws.delta_d), 40)
    heights = intercept[known, None] + slope[known, None] * x
    low, high = np.quantile(heights, _QUANTILES, axis=0)
    ax.fill_between(
        x, low, high, facecolor="none", edgecolor=style.BAND_COLOUR, hatch="//////", lw=0.5,
        zorder=1.1,
    )  # fmt: skip


def draw_floor(ax: Axes, points: pd.DataFrame) -> None:
    """Draw three times the largest floor of the points: what is under it, rounding may have made.

    Raises
    ------
    TableError
        When the table tells no floors.
    """
    floors = points[["floor_delta_d", "floor_delta_m"]].max()
    if floors.isna().all():
        raise TableError(
            "floor: the table tells no floors (floor_delta_m, floor_delta_d); compare again"
        )
    for draw, floor in zip((ax.axvline, ax.axhline), 3 * floors, strict=True):
        if np.isfinite(floor):
            draw(floor, color=style.BAND_COLOUR, lw=0.8, ls=":", zorder=1)
