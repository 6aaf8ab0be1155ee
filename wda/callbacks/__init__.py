"""What measures a model while ``transformers.Trainer`` trains it; needs the extra ``[train]``."""

from __future__ import annotations

import importlib.util

from wda.errors import MissingExtraError

if importlib.util.find_spec("transformers") is None:
    raise MissingExtraError(
        "callbacks need transformers, which is not installed; "
        "try: pip install 'weight-decomposition-analysis[train]'"
    )

from wda.callbacks.callback import DecompositionCallback

__all__ = ["DecompositionCallback"]
