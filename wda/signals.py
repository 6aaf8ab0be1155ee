"""What the system says when a mapped file loses its end while it is read."""

from __future__ import annotations

import ctypes
import os
import signal
import threading

_SPEAKING = threading.Lock()
_MESSAGE = (
    "wda: a file was cut short while it was read; is a training still writing it? "
    "compare again when it is whole; what was finished is kept"
)


def explain_files_cut_short() -> None:
    """End this process with one line where reading would end it without a word.

    The pages of a mapped file that was cut short are gone, and whoever touches them gets a signal
    (SIGBUS) that Python cannot handle: its handlers run only after the instruction, which never
    succeeds. A handler of the C library runs at once.
    """
    if hasattr(signal, "SIGBUS"):
        ctypes.CDLL(None).signal(int(signal.SIGBUS), _HANDLER)


def _end(_number: int) -> None:
    # Writing lets other threads run, and they may lose the same file: the first speaks for all.
    if not _SPEAKING.acquire(blocking=False):
        threading.Event().wait()
    os.write(2, f"{_MESSAGE}\n".encode())
    os._exit(1)


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)(_end)  # kept as long as the process lives
