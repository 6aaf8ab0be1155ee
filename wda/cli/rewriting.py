"""``wda merge``: what writes checkpoints anew."""

from __future__ import annotations

import sys
import warnings
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
    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always", UserWarning)
        done = run_merge(adapter, out, base, given, progress=sys.stderr.isatty())
    say(*(str(doubt.message) for doubt in doubts))
    show_merged(done, as_json)
    say(f"written to {out}: the merged model")


@app.command()
def convert(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="One adapter, of any layout that is read.")
    ],
    to: Annotated[
        str,
        typer.Option(metavar="peft|lycoris|mlx|nvlabs|torchtune", help="The layout to write."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="LOCATION",
            help="The pre-trained model, where something is computed from it. By default what the "
            "adapter names.",
        ),
    ] = None,
    approximate: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="RANK",
            help="Write factors of this rank for what the layout cannot express, and tell how far "
            "off they are. By default that is refused.",
        ),
    ] = None,
    alpha: Alpha = None,
    enabled: Enabled = None,
    axis: Axis = None,
    initial: Initial = None,
) -> None:
    """Write an adapter in another layout: exactly, or not at all.

    **Examples**

        wda convert runs/dora/checkpoint-100 --to mlx --out converted

        wda convert adapter --to peft --approximate 16 --base hf://org/model --out converted
    """
    from wda.console import show_errors
    from wda.conversion import convert as run_convert

    given = gather(alpha, enabled, axis, initial)
    conversion = run_convert(
        adapter, to, out, base, approximate, given, progress=sys.stderr.isatty()
    )
    say(*conversion.notes)
    show_errors(conversion.errors)
    say(f"written to {out}: {', '.join(file.name for file in conversion.files)}")
