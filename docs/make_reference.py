"""Writes docs/reference.md from the code, so that no field is described twice.

Run it from the top of the repository: python docs/make_reference.py
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from wda.adapters import AdapterConfig
from wda.manifest import Manifest, Run
from wda.spectra import COLUMNS as SPECTRA_COLUMNS
from wda.spectra import VALUES_COLUMNS
from wda.statistics import COLUMNS as STATISTICS_COLUMNS
from wda.statistics import COMPARISON_COLUMNS
from wda.sweeps.grid import SweepFields
from wda.sweeps.table import COLUMNS as SWEEP_COLUMNS
from wda.table import COLUMNS as TABLE_COLUMNS
from wda.training import DataSource, Recipe

HEAD = """# Reference

What stands in every file that wda reads or writes. This page is made by
`python docs/make_reference.py`; change the code, not the page.
"""


def section(title: str, text: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Give a heading, a sentence and a table."""
    lines = [header, tuple("---" for _ in header), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return f"## {title}\n\n{text}\n\n{table}\n"


def fields(model: type[BaseModel]) -> list[tuple[str, ...]]:
    """Give name, default and meaning of every field of a typed file."""
    rows = []
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"`{field.default}`"
        rows.append((f"`{name}`", default, field.description or ""))
    return rows


def render() -> str:
    """Give the page."""
    of_fields = ("field", "default", "meaning")
    return "\n".join(
        [
            HEAD,
            section(
                "`table.parquet`, `table.csv`",
                "One row per run, checkpoint and matrix.",
                ("column", "dtype", "meaning"),
                [(f"`{n}`", c.dtype, c.meaning) for n, c in TABLE_COLUMNS.items()],
            ),
            section(
                "`statistics.csv`",
                "One row per run and matrix label, one per run for all its matrices, and the same "
                "for the runs of a method together; see [statistics.md](statistics.md).",
                ("column", "meaning"),
                [(f"`{n}`", meaning) for n, meaning in STATISTICS_COLUMNS.items()],
            ),
            section(
                "`comparisons.csv`",
                "One row per two runs or methods, matrix label and way of matching.",
                ("column", "meaning"),
                [(f"`{n}`", meaning) for n, meaning in COMPARISON_COLUMNS.items()],
            ),
            section(
                "`spectra.parquet`",
                "One row per singular value; [spectra.md](spectra.md) says how to read them.",
                ("column", "dtype", "meaning"),
                [(f"`{n}`", c.dtype, c.meaning) for n, c in VALUES_COLUMNS.items()],
            ),
            section(
                "`spectra.csv`",
                "One row per run, checkpoint and matrix.",
                ("column", "dtype", "meaning"),
                [(f"`{n}`", c.dtype, c.meaning) for n, c in SPECTRA_COLUMNS.items()],
            ),
            section(
                "`checkpoints_manifest.yaml`",
                "What is to be compared. Relative paths start from the manifest's folder.",
                of_fields,
                fields(Manifest),
            ),
            section("Its `runs`", "Each is one training.", of_fields, fields(Run)),
            section(
                "`recipe.yaml`",
                "A training. Relative paths start from the recipe's folder.",
                of_fields,
                fields(Recipe),
            ),
            section("Its `data`", "A CSV file of labelled texts.", of_fields, fields(DataSource)),
            section(
                "Its `adapter`",
                "Left out, all weights are trained.",
                of_fields,
                fields(AdapterConfig),
            ),
            section(
                "A sweep's `recipe.yaml`",
                "All fields of a recipe, and these.",
                of_fields,
                fields(SweepFields),
            ),
            section(
                "`sweep.csv`",
                "One row per run of a sweep; between `seed` and `accuracy` stand the fields that "
                "its runs differ in.",
                ("column", "meaning"),
                [(f"`{n}`", meaning) for n, meaning in SWEEP_COLUMNS.items()],
            ),
        ]
    )


if __name__ == "__main__":
    Path("docs/reference.md").write_text(render(), encoding="utf-8")
