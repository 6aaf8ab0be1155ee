"""Timing several ways of the same work beside each other."""

from __future__ import annotations

import time
from collections.abc import Callable

REPEATS = 5


def side_by_side(**ways: Callable[[], object]) -> dict[str, float]:
    """Time several ways in turn, several times over; give each one's shortest time in seconds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: min(measured) for name, measured in times.items()}
