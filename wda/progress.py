"""How long things take: progress bars, on standard error, and durations in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


@contextmanager
def progress_bar(show: bool | Progress = True) -> Iterator[Progress]:
    """Give a progress display, or the one that is shown already.

    Tasks put what they like into the last column by updating their field ``note``.
    """
    if isinstance(show, Progress):
        yield show
        return
    with Progress(*columns(), console=Console(stderr=True), disable=not show) as progress:
        yield progress


def columns() -> tuple[ProgressColumn, ...]:
    """Give what stands in a line: description, bar, count, share, time left, and a free column."""
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )


def duration(seconds: float) -> str:
    """Write a duration in the unit that suits it.

    Examples
    --------
    >>> duration(0.25), duration(200), duration(10_000), duration(1e6)
    ('0.25 seconds', '3.3 minutes', '2.8 hours', '12 days')
    """
    units = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))
    name, size = next(((n, s) for n, s in units if seconds >= 2 * s), ("seconds", 1.0))
    return f"{seconds / size:.2g} {name}"
