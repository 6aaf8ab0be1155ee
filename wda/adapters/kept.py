"""Values that are computed once for as long as the tensors they come from stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")

# Which tensor, of which dtype, and how often it was changed in place.
_State = tuple[int, torch.dtype, int]


class Kept(Generic[Value]):
    """What is made of tensors without gradient, kept until one of its sources changes."""

    def __init__(self) -> None:
        self._value: Value | None = None
        self._of: list[_State] = []

    def get(self, compute: Callable[[], Value], sources: list[Tensor]) -> Value:
        """Give the value, computed anew where a source has changed.

        Parameters
        ----------
        compute : callable
            Computes the value from the sources.
        sources : list of Tensor
            All that the value depends on.
        """
        # Neither compiled code nor inference mode's own tensors count changes.
        if torch.compiler.is_compiling() or any(source.is_inference() for source in sources):
            with torch.no_grad():
                return compute()
        current = [(source.data_ptr(), source.dtype, source._version) for source in sources]
        if self._value is None or self._of != current:
            # A tensor made in inference mode could not be used by a training afterwards.
            with torch.inference_mode(False), torch.no_grad():
                self._value, self._of = compute(), current
        return self._value

    def forget(self) -> None:
        """Drop the value."""
        self._value = None
