"""The most memory that a training takes."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import psutil
import torch

_SECONDS_BETWEEN = 0.02


class PeakMemory:
    """Watches memory while the block runs.

    An accelerator counts what it gave out by itself. Else a thread looks at the resident memory of
    the process, with all that lay in it before, fifty times a second.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        """Begin to watch."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self._watching.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop, and keep what was most."""
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self._over.set()
            self._watching.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.peak = max(self.peak, process.memory_info().rss)
            if self._over.wait(_SECONDS_BETWEEN):
                return
