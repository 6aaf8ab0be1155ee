"""The command line: parse, one library call, print."""

from __future__ import annotations

from wda.cli import analysing, rewriting, training  # noqa: F401 - they add their commands
from wda.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line."""
    app()
