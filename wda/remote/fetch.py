"""Fetching a range of bytes whatever the network does: in parts, again, and from where it broke."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from wda.errors import LocationError

# Large enough that the way there and back costs little, small enough that several are in flight.
PART = 8 << 20
IN_FLIGHT = 8

Item = TypeVar("Item")
Result = TypeVar("Result")
# Reads from a key, from a byte on, into a buffer; gives how many bytes came.
Piece = Callable[[str, int, memoryview], int]


class TemporaryError(Exception):
    """A failure that may be over when one asks again, after ``wait`` seconds if the server said."""

    def __init__(self, why: object, wait: float | None = None) -> None:
        super().__init__((str(why).strip().splitlines() or [type(why).__name__])[0])
        self.wait = wait


@dataclass
class Patience:
    """How long to put up with a server.

    Attributes
    ----------
    timeout : float
        Seconds without a byte after which a connection counts as dead.
    tries : int
        Failures in a row, with no byte between them, after which to give up.
    wait : float
        Seconds before the second try; doubled before each further one.
    longest : float
        The most seconds to wait, also when the server asks for more.
    """

    timeout: float = 30
    tries: int = 6
    wait: float = 0.5
    longest: float = 60


PATIENCE = Patience()


def fetch(piece: Piece, key: str, start: int, stop: int, shown: str) -> bytearray:
    """Fetch a range of bytes, large ones in parts that travel side by side.

    Raises
    ------
    LocationError
        When a part cannot be had, naming ``shown`` and why.
    """
    buffer = bytearray(stop - start)
    view = memoryview(buffer)
    offsets = range(0, len(buffer), PART)

    def fill(offset: int) -> None:
        _fill(piece, key, start + offset, view[offset : offset + PART], shown)

    at_once(fill, offsets)
    return buffer


def persist(ask: Callable[[], Result], shown: str) -> Result:
    """Ask until there is an answer, waiting longer each time.

    Raises
    ------
    LocationError
        When the patience is at an end.
    """
    failures = 0
    while True:
        try:
            return ask()
        except TemporaryError as error:
            failures += 1
            _wait(failures, error, shown)


def at_once(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Apply a function that waits for the network to several items side by side, in order."""
    todo = list(items)
    if len(todo) < 2:
        return [function(item) for item in todo]
    with ThreadPoolExecutor(min(IN_FLIGHT, len(todo)), "wda-fetch") as pool:
        return list(pool.map(function, todo))


def _fill(piece: Piece, key: str, start: int, into: memoryview, shown: str) -> None:
    """Fill a buffer, each time going on from the last byte that came."""
    filled = failures = 0
    while filled < len(into):
        try:
            came = piece(key, start + filled, into[filled:])
            error = TemporaryError(f"the answer ended after {filled + came} of {len(into)} bytes")
        except TemporaryError as failed:
            came, error = 0, failed
        filled += came
        if filled < len(into):
            failures = 1 if came else failures + 1
            _wait(failures, error, shown)


def _wait(failures: int, error: TemporaryError, shown: str) -> None:
    if failures >= PATIENCE.tries:
        raise LocationError(
            f"{shown}: cannot be read, tried {failures} times: {error}; "
            "try again later, or download it and give its path"
        )
    asked = error.wait if error.wait is not None else PATIENCE.wait * 2 ** (failures - 1)
    time.sleep(min(asked, PATIENCE.longest))
