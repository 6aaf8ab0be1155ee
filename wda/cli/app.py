"""The program itself: its commands are added by the modules beside this one."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from wda._version import __version__
from wda.errors import WdaError

# What a comparison writes.
WRITTEN = "tables, scatter.png, scatter.pdf, provenance.json"


class _Group(TyperGroup):
    """Turns an error the user can mend into one line and exit code 1, and Ctrl-C into 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except WdaError as error:
            _fail(error)
        except KeyboardInterrupt as interruption:
            say(f"wda: interrupted; {str(interruption) or 'what was finished is kept'}")
            # Threads that wait for a slow disk or a far server would be waited for; they write
            # nothing.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Weight decomposition analysis: how did fine-tuning change the weights, "
    "in magnitude and in direction?",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wda {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def say(*lines: str) -> None:
    """Tell the user something beside the result, on standard error."""
    for line in lines:
        typer.echo(line, err=True)


def _fail(error: WdaError) -> NoReturn:
    """Print an error as one line, and exit with 1."""
    say("wda: " + " ".join(str(error).split()))
    raise typer.Exit(1) from None
