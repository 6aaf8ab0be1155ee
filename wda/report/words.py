"""Statistics as a reader takes them in: one cell per estimate, with its interval beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import pandas as pd

from wda import style
from wda.statistics import correlation as written
from wda.statistics import ends

NOTHING = "–"

# A row of statistics or comparisons by column.
Row = dict[Hashable, Any]


def headline(statistics: pd.DataFrame) -> pd.DataFrame:
    """Give the columns of the statistics that a reader asks for first, as text.

    A column that the statistics lack, or that is empty throughout, is left out; so is what would
    say the same in every row: the method of runs that are called after it, and the one axis.

    Parameters
    ----------
    statistics : pandas.DataFrame
        Columns as in :data:`wda.statistics.COLUMNS`; those of intervals, parts and null models may
        be missing.

    Returns
    -------
    pandas.DataFrame
        One row per row of the statistics. An estimate stands with its 95 % interval,
        ``+0.83 [+0.64, +0.92]``; what is not known is a dash.
    """
    rows = [_row(row) for row in statistics.to_dict(orient="records")]
    shown = pd.DataFrame(rows, index=statistics.index, columns=list(_row({})))
    named = shown[statistics["run"].notna()]
    if (named["run"].str.lower() == named["method"].str.lower()).all():
        shown = shown.drop(columns="method")
    return _told(shown)


def differences(comparisons: pd.DataFrame) -> pd.DataFrame:
    """Give the differences between runs as text, laid out as :func:`headline`."""
    rows = [
        {
            "first": _name(row, "_a"),
            "second": _name(row, "_b"),
            "matrix": _text(row.get("matrix")),
            "vectors": vectors(row),
            "matched": _text(row.get("matched")),
            "n": f"{_text(row.get('n_a'))}, {_text(row.get('n_b'))}",
            "difference of r": estimate(row, "r_difference"),
            "difference of slope": estimate(row, "slope_difference", significant),
            "note": _text(row.get("note")),
        }
        for row in comparisons.to_dict(orient="records")
    ]
    return _told(pd.DataFrame(rows))


def _told(shown: pd.DataFrame) -> pd.DataFrame:
    """Leave out columns that tell nothing, and the vectors where they are all of a kind."""
    if shown["vectors"].nunique() == 1:
        shown = shown.drop(columns="vectors")
    return shown.loc[:, [name for name in shown if (shown[name] != NOTHING).any()]]


def _row(row: Row) -> dict[str, str]:
    return {
        "run": _name(row),
        "method": style.METHOD_NAMES.get(str(row.get("method")), _text(row.get("method"))),
        "matrix": _text(row.get("matrix")),
        "vectors": vectors(row),
        "n": _text(row.get("n")),
        "clusters": _text(row.get("clusters")),
        "r": estimate(row, "pearson_r"),
        "r within layers": estimate(row, "within_layer_r"),
        "r between layers": estimate(row, "between_layer_r"),
        "slope": estimate(row, "slope", significant),
        "random updates": _text(row.get("null")),
        "their r": _band(row),
        "p": _p_value(row.get("null_p")),
        "reading": _text(row.get("reading")),
    }


def vectors(row: Row) -> str:
    """Say what the vectors are: which axis, and whether of a head or of a whole matrix."""
    per = _text(row.get("per"))
    granularity = row.get("granularity")
    return per if _missing(granularity) or granularity == "vector" else f"{per}, by {granularity}"


def correlation(value: float) -> str:
    """Give a correlation with its sign."""
    return _minus(written(value))


def significant(value: float) -> str:
    """Give a number with its sign and three digits."""
    return _minus(f"{value:+#.3g}".rstrip("."))


def estimate(row: Row, name: str, write: Callable[[float], str] = correlation) -> str:
    """Give an estimate with its interval, or a dash where it is not determined."""
    value, low, high = (row.get(key, math.nan) for key in (name, f"{name}_low", f"{name}_high"))
    if _missing(value):
        return NOTHING
    if _missing(low):
        return write(value)
    around = ends(low, high) if write is correlation else (write(low), write(high))
    return f"{write(value)} [{', '.join(map(_minus, around))}]"


def _band(row: Row) -> str:
    low, high = (row.get(f"null_r_{end}", math.nan) for end in ("low", "high"))
    return NOTHING if _missing(low) else " to ".join(map(_minus, ends(low, high)))


def _p_value(p: Any) -> str:
    if _missing(p):
        return NOTHING
    return "< 0.001" if p < 1e-3 else f"{p:.2g}"


def _name(row: Row, which: str = "") -> str:
    """Name a run, or all the runs of a method."""
    run, method = row.get(f"run{which}"), row.get(f"method{which}")
    if not _missing(run):
        return str(run)
    if _missing(method):
        return NOTHING
    runs = row.get("runs")
    name = style.METHOD_NAMES.get(str(method), str(method))
    return f"{name}, all runs" if _missing(runs) else f"{name}, {runs} runs together"


def _text(value: object) -> str:
    """Give words or a count as they are; one that stands in a column with gaps is a float."""
    if _missing(value) or value == "":
        return NOTHING
    return f"{value:g}" if isinstance(value, float) else str(value)


def _missing(value: object) -> bool:
    return bool(pd.isna(value))  # type: ignore[call-overload]


def _minus(number: str) -> str:
    """Write minus signs as such; a hyphen is narrower than the plus above it."""
    return number.replace("-", "−")
