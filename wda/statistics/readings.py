"""A row of the statistics in one sentence, for those who do not read columns."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from wda.statistics.clouds import Cloud
from wda.statistics.resampling import FEWEST_LAYERS

Row = Mapping[str, object]


def read(row: Row, cloud: Cloud, floored_left_out: bool) -> str:
    """Say what r says: with what certainty, more than chance or not, of what it is made."""
    why = cloud.why_no_line()
    if not len(cloud) and floored_left_out and row["n_below_floor"]:
        why = f"all {row['n_below_floor']} points lie under three times their floor"
    elif not why and _missing(row, "pearson_r"):
        why = "ΔM is the same at all points"
    if why:
        return f"no r: {why}"
    parts = [
        _certainty(row, cloud) + _chance(row),
        _chance_between(row, cloud),
        _split(row, cloud),
        _floors(row, floored_left_out),
    ]
    return "; ".join(part for part in parts if part)


def _certainty(row: Row, cloud: Cloud) -> str:
    layers = _number(cloud.layers, "layer")
    runs = "one run" if cloud.runs == 1 else f"{cloud.runs} runs"
    if cloud.layers < FEWEST_LAYERS:
        return (
            f"r {_signed(row['pearson_r'])} over {layers} of {runs}, "
            f"fewer than the {FEWEST_LAYERS} that an interval takes,"
        )
    return f"r {_signed(row['pearson_r'])}{_ends(row, 'pearson_r')} over {layers} of {runs}"


def _chance(row: Row) -> str:
    """Set r beside the random updates."""
    if _missing(row, "null_p"):
        return " is not set beside random updates"
    r, low, high = (_float(row[name]) for name in ("pearson_r", "null_r_low", "null_r_high"))
    band = (
        f"the band of {row['null']} random updates, {' to '.join(ends(low, high))} "
        f"(p {_float(row['null_p']):.2g})"
    )
    if low <= r <= high:
        return f" lies inside {band}: no more than chance"
    where = "below" if r < low else "above"
    return f" lies {where} {band}: not what chance gives"


def _chance_between(row: Row, cloud: Cloud) -> str:
    """Set r between layers beside that of the random updates, where it is another than r."""
    if cloud.steps == 1 or _missing(row, "null_between_p"):
        return ""
    names = ("between_layer_r", "null_between_r_low", "null_between_r_high")
    r, low, high = (_float(row[name]) for name in names)
    where = "inside" if low <= r <= high else "below" if r < low else "above"
    return (
        f"between layers {correlation(r)} lies {where} theirs, {' to '.join(ends(low, high))} "
        f"(p {_float(row['null_between_p']):.2g})"
    )


def _split(row: Row, cloud: Cloud) -> str:
    """Say so when r mixes effects of opposite sign (Simpson's paradox)."""
    if cloud.steps == 1:
        return "one step, so nothing is said of change over time"
    within, between = row.get("within_layer_r"), row.get("between_layer_r")
    if _missing(row, "within_layer_r") or _missing(row, "between_layer_r"):
        return ""
    if _float(within) * _float(between) >= 0:
        return ""
    sure = not _spans_zero(row, "within_layer_r") and not _spans_zero(row, "between_layer_r")
    return (
        f"it mixes {_signed(within)}{_ends(row, 'within_layer_r')} within layers over the steps "
        f"and {_signed(between)}{_ends(row, 'between_layer_r')} between layers, "
        + ("of opposite sign" if sure else "whose signs differ, though not for certain")
    )


def _floors(row: Row, left_out: bool) -> str:
    if not row["n_below_floor"]:
        return ""
    what = "left out" if left_out else "among them"
    return f"{row['n_below_floor']} points under three times their floor are {what}"


def _spans_zero(row: Row, name: str) -> bool:
    low, high = (_float(row.get(f"{name}_{end}")) for end in ("low", "high"))
    return not (low > 0 or high < 0)


def _ends(row: Row, name: str) -> str:
    if _missing(row, f"{name}_low"):
        return ""
    low, high = (_float(row[f"{name}_{end}"]) for end in ("low", "high"))
    return f" [{', '.join(ends(low, high))}]"


def correlation(r: float) -> str:
    """Write a correlation: two decimals, or four where two would make it 1 and it is not."""
    finer = f"{r:+.4f}"
    return finer if abs(r) >= 0.995 and abs(float(finer)) < 1 else f"{r:+.2f}"


def ends(low: float, high: float) -> tuple[str, str]:
    """Write the ends of an interval of a correlation, with four decimals where both are near 1."""
    if low * high > 0 and min(abs(low), abs(high)) >= 0.995:
        return correlation(low), correlation(high)
    return f"{low:+.2f}", f"{high:+.2f}"


def _signed(value: object) -> str:
    return correlation(_float(value))


def _number(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _float(value: object) -> float:
    return float(value)  # type: ignore[arg-type]


def _missing(row: Row, name: str) -> bool:
    return bool(pd.isna(row.get(name)))  # type: ignore[call-overload]
