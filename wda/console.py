"""What commands print on standard output, for a person or for a program."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from typer import echo

from wda.errors import listing

if TYPE_CHECKING:
    import pandas as pd

    from wda.diagnosis import Finding
    from wda.inspection import Inspection
    from wda.merging import Merged
    from wda.plan import Reading


def show_statistics(statistics: pd.DataFrame, as_json: bool) -> None:
    """Print statistics on standard output: for a person a selection, for a program all columns."""
    if as_json:
        echo(statistics.to_json(orient="records", indent=2, double_precision=15))
        return
    statistics = statistics.assign(run=statistics["run"].fillna("all runs"))
    # The axis and granularity of the vectors are told where there are several.
    several = [c for c in ("per", "granularity") if statistics[c].nunique(dropna=False) > 1]
    words = ["run", "method", "matrix", *several]
    # Of one label alone, all of them say the same again.
    labels = statistics.groupby(["run", "method", *several], dropna=False)["matrix"]
    alone = (statistics["matrix"] == "all") & (labels.transform("size") == 2)
    rows = statistics[~alone].to_dict("records")
    numbers = [name for name, show in _SHOWN.items() if any(map(show, rows))]
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in (*words, "n", *numbers):
        justify: Any = "left" if name in words else "right"
        shown.add_column(name, justify=justify, min_width=min(len(name), 9), overflow="fold")
    for row in rows:
        cells = [_SHOWN[name](row) or "–" for name in numbers]
        shown.add_row(*(escape(str(row[name])) for name in (*words, "n")), *cells)
    console = roomy_console(120)
    console.print(shown)
    for row in rows:
        where = ", ".join(str(row[name]) for name in words if name != "method")
        console.print(f"{escape(where)}: {escape(str(row['reading']))}", soft_wrap=True)


def roomy_console(width: int) -> Console:
    """Give what a person's tables are printed on; in a file there is room for so many letters."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = width
    return console


def show_plan(readings: Sequence[Reading], as_json: bool) -> None:
    """Print what would be read, for a person with a sum below or for a program."""
    if as_json:
        echo(json.dumps([asdict(reading) for reading in readings], indent=2))
        return
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("run", "step", "location"):
        shown.add_column(column, overflow="fold")
    for column in ("tensors", "bytes", "bytes of headers"):
        shown.add_column(column, justify="right")
    for r in readings:
        step = "–" if r.step is None else str(r.step)
        counts = (r.tensors, r.tensor_bytes, r.header_bytes)
        shown.add_row(r.run, step, r.location, *(f"{count:,}" for count in counts))
    Console().print(shown)
    tensors = sum(reading.tensor_bytes for reading in readings)
    headers = sum(reading.header_bytes for reading in readings)
    echo(
        f"in sum {tensors:,} bytes of tensors ({decimal(tensors)}) "
        f"and {headers:,} of headers; no tensor was read"
    )


def show_inspection(found: Sequence[Inspection], as_json: bool) -> None:
    """Print the newest checkpoint of a run, its matrices grouped by what they have in common.

    For a program, all checkpoints and every matrix of them.
    """
    if as_json:
        echo(json.dumps([asdict(inspection) for inspection in found], indent=2))
        return

    newest = found[-1]
    steps = ", ".join(str(one.step) for one in found if one.step is not None)
    facts = {
        "location": newest.location,
        "layout": f"{newest.layout}, told by {newest.evidence}",
        "method": newest.method,
        "steps": steps or "not known",
        "base": newest.base or "not named",
        "files": ", ".join(f"{name} ({decimal(size)})" for name, size in newest.files.items()),
        "not read": listing(newest.unread) or "nothing",
    }
    for name, fact in facts.items():
        echo(f"{name:9} {fact}")
    groups: dict[tuple[str, ...], list[int]] = {}
    for held in newest.matrices:
        shape = "×".join("?" if size is None else str(size) for size in held.shape)
        rank = "–" if held.rank is None else str(held.rank)
        scaling = "–" if held.scaling is None else f"{held.scaling:g}"
        key = (held.label, shape, held.dtype, held.update, rank, scaling)
        groups.setdefault(key, []).append(-1 if held.layer is None else held.layer)
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("matrix", "out×in", "dtype", "update", "rank", "scaling", "number", "layers"):
        shown.add_column(column)
    for common, layers in groups.items():
        known = sorted(layer for layer in set(layers) if layer >= 0)
        span = f"{known[0]} to {known[-1]}" if len(known) > 1 else "".join(map(str, known)) or "–"
        shown.add_row(*common, str(len(layers)), span)
    Console().print(shown)


def show_merged(done: Sequence[Merged], as_json: bool) -> None:
    """Print what became of each matrix that was merged."""
    if as_json:
        echo(json.dumps([asdict(one) for one in done], indent=2))
        return
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("module", "dtype", "‖Wt−W0‖/‖W0‖", "lost to rounding"):
        shown.add_column(column, overflow="fold")
    for one in done:
        shown.add_row(one.module, one.dtype, f"{one.relative_update:.3g}", f"{one.error:.2%}")
    Console().print(shown)


_COLOURS = {"ok": "green", "suspicious": "yellow", "wrong": "bold red"}


def show_findings(found: Sequence[Finding], as_json: bool) -> None:
    """Print what the checks found, and what to do."""
    if as_json:
        echo(json.dumps([asdict(finding) for finding in found], indent=2))
        return
    console = Console(highlight=False)
    for finding in found:
        verdict = f"[{_COLOURS[finding.verdict]}]{finding.verdict:10}[/]"
        console.print(f"{verdict}  {finding.check}: {escape(finding.number)}", soft_wrap=True)
        if finding.advice:
            console.print(f"            → {escape(finding.advice)}", soft_wrap=True)


def show_errors(errors: Mapping[str, float]) -> None:
    """Print how far off each approximated module is; nothing where all is exact."""
    if not errors:
        return
    shown = Table(box=None, header_style="bold", pad_edge=False)
    shown.add_column("approximated", overflow="fold")
    shown.add_column("relative error", justify="right")
    for module, error in errors.items():
        shown.add_row(module, f"{error:.3g}")
    Console().print(shown)


def _with_ends(row: Mapping[Hashable, Any], name: str) -> str:
    """Write a correlation with its interval; nothing where there is none."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    around = "" if math.isnan(low) else f" [{_ends(low, high, ', ')}]"
    return "" if math.isnan(row[name]) else f"{_r(row[name])}{around}"


def _r(value: float) -> str:
    from wda.statistics import correlation  # noqa: PLC0415 - pandas is slow to import

    return correlation(value)


def _alone(row: Mapping[Hashable, Any], name: str, digits: str) -> str:
    value = row.get(name, math.nan)
    return "" if math.isnan(value) else f"{value:{digits}}"


def _ends(low: float, high: float, between: str) -> str:
    from wda.statistics import ends  # noqa: PLC0415 - pandas is slow to import

    return between.join(ends(low, high))


def _lone_r(row: Mapping[Hashable, Any], name: str) -> str:
    return "" if math.isnan(row[name]) else _r(row[name])


def _band(row: Mapping[Hashable, Any]) -> str:
    low, high = row["null_r_low"], row["null_r_high"]
    return "" if math.isnan(low) else _ends(low, high, " to ")


# What a person is shown of the numbers, and how; a column that would be empty is left out.
_SHOWN: dict[str, Callable[[Mapping[Hashable, Any]], str]] = {
    "pearson_r": lambda row: _with_ends(row, "pearson_r"),
    "paper_r": lambda row: _alone(row, "paper_r", "+.2f"),
    "random r": _band,
    "slope": lambda row: _alone(row, "slope", "+.3g"),
    "within layers": lambda row: _lone_r(row, "within_layer_r"),
    "between layers": lambda row: _lone_r(row, "between_layer_r"),
}
