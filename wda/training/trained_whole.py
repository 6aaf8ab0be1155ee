"""Modules that are trained as they are, beside an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from torch import nn

from wda.errors import SelectionError


def modules_called(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Find modules by their path or the last names of it, as PEFT's ``modules_to_save`` does.

    Parameters
    ----------
    model : nn.Module
        The model.
    names : sequence of str
        Such as ``multi_modal_projector`` or ``layers.0.mlp``.

    Returns
    -------
    tuple of str
        Their paths.

    Raises
    ------
    SelectionError
        When a name finds none.
    """
    paths = [path for path, _ in model.named_modules() if path]
    found: list[str] = []
    for name in names:
        fits = [path for path in paths if path == name or path.endswith(f".{name}")]
        if not fits:
            last = sorted({path.rpartition(".")[2] for path in paths})
            near = get_close_matches(name, last, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise SelectionError(f"trained_whole: no module is called {name!r}{hint}")
        found += fits
    return tuple(dict.fromkeys(found))
