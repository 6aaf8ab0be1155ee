"""The scatter that a reader can ask: the points of a table as plotly draws them."""

from __future__ import annotations

import html
import json
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from wda import style
from wda.draws import Draws
from wda.report.words import vectors
from wda.statistics import ALL

# More points than this make the page too large and the browser slow.
MOST_POINTS = 12_000

# plotly's names of matplotlib's markers, and letters that look like them.
_SYMBOLS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
    "*": "star",
}
_GLYPHS = dict(zip(_SYMBOLS, "●■▲◆▼✚✖★", strict=True))

# Black would vanish on a dark page.
_COLOURS = [*style.RUN_COLOURS[:-1], "#808080"]
_FLOORED = "#a0a0a0"

_HOVER = (
    "%{fullData.name}<br>%{customdata[0]}, %{meta.label}<br>%{customdata[1]}<br>"
    "ΔD %{x:.4g}<br>ΔM %{y:.4g}"
)
_NOISE = "<br>under three times its rounding floor"
_RANDOM = "<br>mean of random updates as large"


def points(table: pd.DataFrame, draws: Draws | None = None) -> pd.DataFrame:
    """Give the rows that can be drawn, with what the scatter says of each.

    Parameters
    ----------
    table : pandas.DataFrame
        A comparison's table.
    draws : Draws or None
        Random updates beside it, whose means are added as ``random_m`` and ``random_d``.

    Returns
    -------
    pandas.DataFrame
        Rows with both ΔM and ΔD, at most :data:`MOST_POINTS` of them, taken at random.
    """
    said = table.assign(
        vectors=[vectors(row) for row in table[["per", "granularity"]].to_dict(orient="records")],
        where=_places(table),
        when=_steps(table["step"]),
        floored=_flags(table),
    )
    if draws is not None:
        said = said.assign(random_m=draws.delta_m.mean(1), random_d=draws.delta_d.mean(1))
    known: pd.DataFrame = said[np.isfinite(said["delta_m"]) & np.isfinite(said["delta_d"])]
    if len(known) > MOST_POINTS:
        known = known.sample(MOST_POINTS, random_state=0).sort_index()
    return known


def traces(shown: pd.DataFrame, statistics: pd.DataFrame) -> list[dict[str, Any]]:
    """Give what plotly draws, each part with the run, matrix and vectors it belongs to in ``meta``.

    Parameters
    ----------
    shown : pandas.DataFrame
        What :func:`points` gives.
    statistics : pandas.DataFrame
        The fits, drawn as lines.

    Returns
    -------
    list of dict
        Traces, ready for JSON. Names in them are text: plotly's own tags and templates in them
        are taken for letters.
    """
    runs = list(dict.fromkeys(shown["run"]))
    looks = {run: _COLOURS[i % len(_COLOURS)] for i, run in enumerate(runs)}
    symbols, sizes = _markers(shown)
    made: list[dict[str, Any]] = []
    for (run, matrix, kind), rows in shown.groupby(["run", "matrix", "vectors"], sort=False):
        of = {"run": run, "matrix": matrix, "vectors": kind, "label": label(matrix)}
        for floored, some in rows.groupby("floored"):
            marker: dict[str, Any] = {
                "color": _FLOORED if floored else looks[run],
                "symbol": some["when"].map(symbols).to_list(),
                "size": some["when"].map(sizes).to_list(),
                "line": {"width": 0.5, "color": "white"},
            }
            remark = _NOISE if floored else ""
            made.append(_cloud(some, "delta", of | {"kind": "points"}, marker, remark))
        if "random_d" in rows:
            marker = {"color": looks[run], "symbol": "x-thin-open", "size": 7}
            made.append(_cloud(rows, "random", of | {"kind": "random"}, marker, _RANDOM))
    return [*made, *_lines(shown, statistics, looks)]


def figure(drawn: list[dict[str, Any]]) -> Any:
    """Give traces as plotly's JSON, in Python's own values.

    Returns
    -------
    dict
        ``data`` and ``layout``; numbers keep every digit.
    """
    import plotly.graph_objects as go  # noqa: PLC0415 - an extra

    made = go.Figure(data=drawn, layout=_LAYOUT)
    return json.loads(made.to_json())


def key(shown: pd.DataFrame) -> list[tuple[str, str]]:
    """Say which marker is which checkpoint: glyph and words; none where they are not told apart."""
    steps = list(dict.fromkeys(shown.sort_values("step")["when"]))
    if not 1 < len(steps) <= len(style.MARKERS):
        return []
    return [(glyph, step) for glyph, step in zip(_GLYPHS.values(), steps, strict=False)]


def label(name: object) -> str:
    """Give a name as plotly has to be told it, so that it is drawn as it is; long ones in lines.

    Examples
    --------
    >>> label("a<b> & %{x}")
    'a&lt;b&gt; &amp; %&#123;x}'
    """
    lines = textwrap.wrap(str(name), 36) or [""]
    return "<br>".join(html.escape(line, quote=False).replace("%{", "%&#123;") for line in lines)


_AXIS = {
    "zeroline": False,
    "exponentformat": "power",
    "showexponent": "all",
    "ticks": "outside",
    "automargin": True,
}
_LAYOUT: dict[str, Any] = {
    "template": "none",
    "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
    "xaxis": {**_AXIS, "title": {"text": "ΔD, change of direction", "standoff": 10}},
    "yaxis": {**_AXIS, "title": {"text": "ΔM, change of magnitude", "standoff": 14}},
    "hovermode": "closest",
    "hoverlabel": {"align": "left", "namelength": -1},
    "showlegend": True,
    "legend": {
        "orientation": "h",
        "yanchor": "bottom",
        "y": 1.02,
        "x": 0,
        "itemclick": "toggleothers",
        "itemdoubleclick": "toggle",
        "itemsizing": "constant",
    },
}


def _cloud(
    rows: pd.DataFrame, which: str, meta: dict[str, Any], marker: dict[str, Any], remark: str
) -> dict[str, Any]:
    """Draw the points of one run, matrix and kind of vectors: the measured or the random ones."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label(meta["run"]),
        "legendgroup": meta["run"],
        "showlegend": False,
        "meta": meta,
        "x": rows[f"{which}_d"].to_numpy(),
        "y": rows[f"{which}_m"].to_numpy(),
        "marker": {"opacity": 0.9, **marker},
        "customdata": rows[["where", "when"]].to_numpy().tolist(),
        "hovertemplate": f"{_HOVER}{remark}<extra></extra>",
    }


def _lines(
    shown: pd.DataFrame, statistics: pd.DataFrame, looks: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Draw each run's rows of the statistics as far as its points reach."""
    for row in statistics.to_dict(orient="records"):
        run, matrix, kind = row["run"], row["matrix"], vectors(row)
        if run not in looks or pd.isna(row["slope"]):
            continue
        own = shown[(shown["run"] == run) & (shown["vectors"] == kind)]
        own = own if matrix == ALL else own[own["matrix"] == matrix]
        ends = own["delta_d"].min(), own["delta_d"].max()
        yield {
            "type": "scatter",
            "mode": "lines",
            "name": f"{label(run)}: fit",
            "legendgroup": run,
            "showlegend": False,
            "meta": {"run": run, "matrix": matrix, "vectors": kind, "kind": "line"},
            "x": list(ends),
            "y": [row["slope"] * x + row["intercept"] for x in ends],
            "line": {"color": looks[run], "width": 1.5},
            "hoverinfo": "skip",
        }


def _markers(shown: pd.DataFrame) -> tuple[dict[str, str], dict[str, float]]:
    """Give each checkpoint the marker and size it has in the static figures."""
    steps = list(dict.fromkeys(shown.sort_values("step")["when"]))
    order = range(len(steps))
    markers, areas = style.step_markers(order), style.step_sizes(order)
    return (
        {step: _SYMBOLS[markers[i]] for i, step in enumerate(steps)},
        {step: round(1.9 * areas[i] ** 0.5, 1) for i, step in enumerate(steps)},
    )


def _places(table: pd.DataFrame) -> list[str]:
    """Name layer and head of each row; outside the layers the module."""
    named = []
    for layer, module, head in zip(table["layer"], table["module"], table["head"], strict=True):
        where = label(module) if pd.isna(layer) else f"layer {layer}"
        named.append(where if pd.isna(head) else f"{where}, head {head}")
    return named


def _steps(steps: pd.Series) -> list[str]:
    return ["step unknown" if pd.isna(step) else f"step {step}" for step in steps]


def _flags(table: pd.DataFrame) -> pd.Series:
    return table["below_floor"].fillna(False).astype(bool)
