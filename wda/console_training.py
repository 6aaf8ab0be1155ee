"""What commands that train print on standard output."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from typer import echo

from wda.console import roomy_console
from wda.progress import duration

if TYPE_CHECKING:
    import pandas as pd

    from wda.sweeps import Planned
    from wda.training import Recipe
    from wda.training.blueprint import Count
    from wda.training.dry_run import DryRun


def show_counts(counts: Sequence[tuple[Planned, Count]], as_json: bool) -> None:
    """Print trained parameters and their share, a line for each recipe."""
    if as_json:
        rows = [
            {
                "recipe": run.name,
                "base": run.recipe.base,
                "method": run.recipe.method,
                "trainable": count.trainable,
                "parameters": count.parameters,
                "share": count.share,
            }
            for run, count in counts
        ]
        echo(json.dumps(rows, indent=2))
        return
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("recipe", "base", "method"):
        shown.add_column(name, overflow="fold")
    for name in ("trainable", "parameters", "share"):
        shown.add_column(name, justify="right")
    for run, count in counts:
        numbers = (f"{count.trainable:,}", f"{count.parameters:,}", f"{count.share:.4%}")
        shown.add_row(escape(run.name), escape(run.recipe.base), run.recipe.method, *numbers)
    roomy_console(160).print(shown)


def show_dry_run(recipe: Recipe, found: DryRun) -> None:
    """Print what a recipe would do, a line for each thing."""
    taken = found.estimate
    memory = (
        f"{decimal(taken.memory)}: weights {decimal(taken.weights)}, gradients and optimiser "
        f"{decimal(taken.trained)}, activations {decimal(taken.activations)} at "
        f"{recipe.batch_size} × {recipe.max_length} tokens"
    )
    count, steps = taken.count, found.steps
    tokens = "" if found.length is None else f", {found.length} tokens on average"
    facts = {
        "trains": f"{found.method}: {count.trainable:,} of {count.parameters:,} parameters "
        f"({count.share:.3%})",
        "data": "elsewhere"
        if found.rows is None
        else f"{found.rows:,} rows, {found.held_out:,} held out{tokens}",
        "steps": "known when the data are" if steps is None else f"{steps:,}",
        "memory": memory,
        "time": f"about {duration(found.seconds_per_step)} a step"
        + ("" if steps is None else f", {duration(steps * found.seconds_per_step)} in all")
        + ", at the rate of this machine's matrix products, which trainings do not reach",
        "disk": f"{found.kept} checkpoints, {decimal(found.disk)} with the optimiser's state; "
        f"{decimal(found.free)} free",
    }
    for name, fact in facts.items():
        echo(f"{name:7} {fact}")
    for note in found.notes:
        echo(f"note    {note}")
    echo("nothing was trained")


def show_sweep(table: pd.DataFrame, varied: Sequence[str]) -> None:
    """Print what the runs of a sweep came to, the best of each method first."""
    ordered = table.sort_values(["method", "accuracy"], ascending=[True, False], kind="stable")
    shown = Table(box=None, header_style="bold", pad_edge=False)
    words = ["run", *(name for name in varied if name in table)]
    for name in words:
        shown.add_column(name, overflow="fold")
    for name in _OF_SWEEP:
        shown.add_column(name, justify="right")
    for row in ordered.to_dict("records"):
        cells = [_word(row[name]) for name in words]
        numbers = [
            "–" if math.isnan(row[name]) else f"{row[name]:{d}}" for name, d in _OF_SWEEP.items()
        ]
        shown.add_row(*map(escape, cells), *numbers)
    console = roomy_console(160)
    console.print(shown)
    for row in ordered[ordered["error"] != ""].to_dict("records"):
        console.print(
            f"[red]failed[/] {escape(row['run'])}: {escape(row['error'])}", soft_wrap=True
        )


def _word(value: Any) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "–" if missing else f"{value:g}" if isinstance(value, float) else str(value)


# What a person is shown of a sweep's runs, and with how many digits.
_OF_SWEEP = {
    "accuracy": ".3f",
    "loss": ".3f",
    "seconds": ".0f",
    "trainable_share": ".3%",
    "delta_m": ".3g",
    "delta_d": ".3g",
    "pearson_r": "+.2f",
}
