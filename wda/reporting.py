"""The report of a comparison: what its page shows is gathered here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from wda import figures, style
from wda.comparison import Comparison
from wda.diagnosis import Finding, diagnose
from wda.errors import TableError, WdaError, listing
from wda.locations import locate
from wda.manifest import Run
from wda.remote import RemotePlace
from wda.report import ReportContents, write_report


def report(
    comparison: Comparison, path: str | Path, runs: Sequence[Run] = (), progress: bool = True
) -> None:
    """Write a comparison as one HTML page that needs nothing beside it.

    Parameters
    ----------
    comparison : Comparison
        What was measured.
    path : path
        The file to write, such as ``report.html``.
    runs : sequence of Run
        Runs of the comparison, of each of which the newest checkpoint is looked at as
        :func:`wda.diagnosis.diagnose` does it, and what is found told on the page.
    progress : bool
        Whether to show progress bars of that on standard error.

    Raises
    ------
    MissingExtraError
        When jinja2 or plotly is missing.
    OutputError
        When the file cannot be written.
    """
    drawn = dict(_pictures(comparison))
    contents = ReportContents(
        title=_title(comparison),
        table=comparison.table,
        statistics=comparison.statistics,
        comparisons=comparison.comparisons,
        draws=comparison.draws,
        provenance=comparison.provenance,
        notes=comparison.notes,
        findings={run.name: _examine(run, comparison.provenance, progress) for run in runs},
        figures=drawn,
    )
    try:
        write_report(contents, path)
    finally:
        for figure in drawn.values():
            plt.close(figure)


def _pictures(comparison: Comparison) -> Iterator[tuple[str, Figure]]:
    """Draw every kind of figure that there is something for."""
    for draw in figures.KINDS.values():
        with suppress(TableError):
            yield from draw(comparison.material)


def _title(comparison: Comparison) -> str:
    methods = dict(zip(comparison.table["run"], comparison.table["method"], strict=True))
    *names, last = (style.run_title(run, method) for run, method in methods.items())
    if not names:
        return f"{last} against its base"
    return f"{listing(names, 5)} and {last} against their base"


def _examine(run: Run, provenance: dict[str, Any], progress: bool) -> list[Finding]:
    """Have the doctor look at the newest of a run's compared checkpoints.

    Of one that lies elsewhere, or whose base does, only the chosen matrices were fetched; the
    doctor would fetch the rest.
    """
    checked = "the doctor looked at it"
    newest = [one["path"] for one in provenance["checkpoints"] if one["run"] == run.name][-1]
    base = provenance["base"]["location"]
    try:
        if any(isinstance(locate(place), RemotePlace) for place in (newest, base)):
            advice = f"wda doctor {newest} --base {base} would, and fetch it"
            return [Finding("ok", checked, f"no, for it would have to be fetched: {advice}")]
        return diagnose(newest, base, run.given, progress)
    except WdaError as error:
        return [Finding("suspicious", checked, "no", str(error))]
