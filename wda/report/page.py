"""The page: one HTML file, with everything it shows inside."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from wda.errors import MissingExtraError, listing
from wda.files import write_text
from wda.report import interactive, words
from wda.report.contents import ReportContents
from wda.report.pictures import within
from wda.table import check_table

# Letters that all static figures together may take: with plotly's script the page keeps under 8 MB.
_MOST_OF_FIGURES = 2_400_000

# Pixels of the page to an inch of a figure, whose letters are small for a screen.
_SCREEN = 125

# Entries of a list that the provenance on the page shows.
_MOST_LISTED = 20

_NEEDED = ("jinja2", "plotly")

# The first word of a figure's name → what it shows, for those who cannot see it.
_CAPTIONS = {
    "scatter": "ΔM against ΔD, a panel per run and matrix",
    "profile": "ΔM and ΔD of each layer",
    "trajectory": "the path of each layer over the checkpoints",
    "heatmap": "changes by layer and checkpoint, as colours",
    "vectors": "how the changes of single vectors are distributed",
    "spectrum": "singular values",
    "null": "the measured r beside those of random updates",
}


def check_installed() -> None:
    """Make sure that what a report needs is installed.

    Raises
    ------
    MissingExtraError
        When jinja2 or plotly is missing.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"report: needs {' and '.join(missing)}; "
            "try: pip install 'weight-decomposition-analysis[report]'"
        )


def write_report(contents: ReportContents, path: str | Path) -> None:
    """Write a report as one HTML file, whole or not at all.

    The page asks nothing of the network: plotly's script, figures and data stand in it.

    Parameters
    ----------
    contents : ReportContents
        What it shows.
    path : path
        The file to write.

    Raises
    ------
    MissingExtraError
        When jinja2 or plotly is missing.
    TableError
        When the table lacks columns or has no rows.
    OutputError
        When the file cannot be written.
    """
    check_installed()
    table = check_table(contents.table)
    write_text(Path(path), _render(replace(contents, table=table)))


def _render(contents: ReportContents) -> str:
    import jinja2  # noqa: PLC0415 - an extra
    from plotly.offline import get_plotlyjs  # noqa: PLC0415

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("wda.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = interactive.points(contents.table, contents.draws)
    drawn = interactive.traces(shown, contents.statistics)
    return environment.get_template("report.html").render(
        title=contents.title,
        runs=_runs(contents),
        base=_base(contents.provenance),
        headline=words.headline(contents.statistics),
        everything=_everything(contents.statistics),
        differences=_differences(contents.comparisons),
        figure=interactive.figure(drawn),
        matrices=_choices(drawn, "matrix"),
        axes=_choices(drawn, "vectors"),
        key=interactive.key(shown),
        n_shown=len(shown),
        n_points=len(contents.table),
        n_draws=None if contents.draws is None else len(contents.draws),
        pictures=_pictures(contents),
        warnings=contents.notes,
        findings=contents.findings,
        provenance=json.dumps(
            _shortened(contents.provenance), indent=2, ensure_ascii=False, default=str
        ),
        made=_made(contents.provenance),
        plotly=get_plotlyjs(),
    )


def _runs(contents: ReportContents) -> pd.DataFrame:
    """Tell of each run what was measured of it, and where it lies."""
    places = _places(contents.provenance)
    return pd.DataFrame(
        {
            "run": str(run),
            "method": _listed(rows["method"]),
            "seed": _listed(rows["seed"]),
            "steps": _listed(rows["step"]),
            "layers": str(rows["layer"].nunique() or words.NOTHING),
            "matrices": _listed(rows["matrix"]),
            "vectors per": _listed(rows["per"]),
            "stored as": _listed(rows["dtype"]),
            "lies at": places.get(str(run), words.NOTHING),
        }
        for run, rows in contents.table.groupby("run", sort=False)
    )


def _listed(values: pd.Series) -> str:
    return listing(dict.fromkeys(values.dropna()), 8) or words.NOTHING


def _places(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Give by run where its checkpoints lie: the folder that holds them, if there are several."""
    paths: dict[str, list[str]] = {}
    for checkpoint in provenance.get("checkpoints", ()):
        paths.setdefault(str(checkpoint["run"]), []).append(str(checkpoint["path"]))
    return {
        run: found[0] if len(found) == 1 else found[0].rstrip("/").rpartition("/")[0]
        for run, found in paths.items()
    }


def _base(provenance: Mapping[str, Any]) -> str:
    base = provenance.get("base")
    return str(base["location"]) if isinstance(base, Mapping) else ""


def _made(provenance: Mapping[str, Any]) -> str:
    """Say which wda made the table, and when."""
    said = [f"wda {provenance['wda']}"] if "wda" in provenance else ["wda"]
    return ", ".join([*said, *([str(provenance["time"])] if "time" in provenance else [])])


def _everything(statistics: pd.DataFrame) -> pd.DataFrame:
    """Write every number of the statistics with four digits."""
    return statistics.map(_cell)


def _cell(value: Any) -> str:
    if pd.isna(value):
        return words.NOTHING
    return f"{value:.4g}".replace("-", "−") if isinstance(value, float) else str(value)


def _differences(comparisons: pd.DataFrame | None) -> pd.DataFrame | None:
    if comparisons is None or comparisons.empty:
        return None
    return words.differences(comparisons)


def _choices(drawn: list[dict[str, Any]], what: str) -> list[str]:
    return list(dict.fromkeys(t["meta"][what] for t in drawn if t["meta"]["kind"] == "points"))


def _pictures(contents: ReportContents) -> list[dict[str, Any]]:
    share = _MOST_OF_FIGURES // max(1, len(contents.figures))
    return [
        {
            "name": name,
            "caption": _caption(name),
            "source": within(figure, share),
            "width": round(_SCREEN * figure.get_figwidth()),
        }
        for name, figure in contents.figures.items()
    ]


def _caption(name: str) -> str:
    kind, *rest = re.split(r"[-_]", name)
    if kind not in _CAPTIONS:
        return name
    return ": ".join([_CAPTIONS[kind], *([" ".join(rest)] if rest else [])])


def _shortened(value: Any) -> Any:
    """Cut long lists, such as those of a sharded model's files, and say so."""
    if isinstance(value, Mapping):
        return {str(key): _shortened(item) for key, item in value.items()}
    if not isinstance(value, list | tuple):
        return value
    shown = [_shortened(item) for item in value[:_MOST_LISTED]]
    left = len(value) - len(shown)
    return [*shown, f"… {left} more, in provenance.json"] if left else shown
