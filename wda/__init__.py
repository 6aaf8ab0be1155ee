"""Weight decomposition analysis: how fine-tuning changed the weights, in magnitude and direction.

=========  ======================================================================
notation   meaning
=========  ======================================================================
W0, Wt     a weight matrix before fine-tuning and at step t, (out_features, in_features)
w_0, w_t   one of its vectors: a row for ``per="output"`` (default), a column for ``per="input"``
m          the magnitude ‖w‖ of a vector
V          an unnormalised direction: DoRA trains Wt = m·V/‖V‖ with V = W0 + s·B·A
A, B, s    the factors (rank, in) and (out, rank) of a low-rank update s·B·A
ΔM         mean over the vectors of |m_t − m_0|
ΔD         mean over the vectors of 1 − cos(w_t, w_0)
=========  ======================================================================

The public names are those in ``__all__``; each is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from wda._version import __version__

if TYPE_CHECKING:
    from wda import adapters, callbacks, figures, training
    from wda.comparison import Comparison, compare, reopen
    from wda.conversion import convert
    from wda.decomposition import Decomposition, decompose
    from wda.errors import WdaError
    from wda.manifest import Manifest, load_manifest
    from wda.merging import merge
    from wda.statistics import compare_methods, compute_statistics
    from wda.table import read_table

__all__ = [
    "Comparison",
    "Decomposition",
    "Manifest",
    "WdaError",
    "__version__",
    "adapters",
    "callbacks",
    "compare",
    "compare_methods",
    "compute_statistics",
    "convert",
    "decompose",
    "figures",
    "load_manifest",
    "merge",
    "read_table",
    "reopen",
    "training",
]

_HOMES = {
    "Comparison": "wda.comparison",
    "Decomposition": "wda.decomposition",
    "Manifest": "wda.manifest",
    "WdaError": "wda.errors",
    "compare": "wda.comparison",
    "compare_methods": "wda.statistics",
    "compute_statistics": "wda.statistics",
    "convert": "wda.conversion",
    "decompose": "wda.decomposition",
    "load_manifest": "wda.manifest",
    "merge": "wda.merging",
    "read_table": "wda.table",
    "reopen": "wda.comparison",
}


def __getattr__(name: str) -> object:
    """Import a public name on its first use."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in __all__:
        return importlib.import_module(f"wda.{name}")
    raise AttributeError(f"module 'wda' has no attribute {name!r}")
