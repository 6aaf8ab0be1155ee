"""``wda merge``: what writes checkpoints anew."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from wda.cli.app import app, say
from wda.cli.options import Alpha, Axis, Enabled, Initial, gather


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter of any layout.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the merged model.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="LOCATION", help="The model it was trained on; by default what it names."
        ),
    ] = None,
    alpha: Alpha = None,
    enabled: Enabled = None,
    axis: Axis = None,
    initial: Initial = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what became of each matrix as JSON.")
    ] = False,
) -> None:
    """Merge an adapter into its base: a model of the same size and speed as the base.

    Written in the base's dtype and shards, one block of rows at a time; for each matrix it is told
    which share of the update the rounding to that dtype loses.

    **Example**

        wda merge runs/dora/checkpoint-700 --base hf://ORG/NAME --out merged
    """
    from wda.console import show_merged
    from wda.merging import merge as run_merge

    given = gather(alpha, enabled, axis, initial)
    done = run_merge(adapter, out, base, given, progress=sys.stderr.isatty())
    show_merged(done, as_json)
    say(f"written to {out}: the merged model")
