"""Singular spectra of W0, Wt and ΔW = Wt − W0, and what follows from them.

What is measured is read again without torch: only measuring imports it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from wda.spectra.frames import (
    COLUMNS,
    VALUES_COLUMNS,
    read_spectra,
    saturation_notes,
    write_spectra,
)

if TYPE_CHECKING:
    from wda.spectra.measuring import measure_spectra

__all__ = [
    "COLUMNS",
    "VALUES_COLUMNS",
    "measure_spectra",
    "read_spectra",
    "saturation_notes",
    "write_spectra",
]


def __getattr__(name: str) -> object:
    """Import the measuring on its first use."""
    if name == "measure_spectra":
        return importlib.import_module("wda.spectra.measuring").measure_spectra
    raise AttributeError(f"module 'wda.spectra' has no attribute {name!r}")
