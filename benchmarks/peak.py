"""Prints the peak of anonymous memory, in MiB, that a comparison takes above the interpreter."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import torch

import wda
import wda.comparison
import wda.kernels


def anonymous() -> int:
    """Give the bytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) << 10


def main() -> None:
    """Compare while a thread watches."""
    # What is loaded once whatever the size belongs to the interpreter.
    some = torch.randn(2, 2).bfloat16()
    wda.kernels.squared_norms(some)
    wda.kernels.products_with_changes(some, [some, some, some])
    _ = some.double() @ some.double()
    start, peaks, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peaks.append(anonymous())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    base, *runs = sys.argv[1:]
    wda.compare(runs, base=base, cache=False, progress=False)
    done.set()
    thread.join()
    print((max(peaks) - start) >> 20)


if __name__ == "__main__":
    main()
