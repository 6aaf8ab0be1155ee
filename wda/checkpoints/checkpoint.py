"""What every layout on disk is read as: named modules, each with an update of its matrix."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import ClassVar, Self

from wda.checkpoints.tensors import Tensors, read_json
from wda.naming import Matrix
from wda.places import Place
from wda.updates import Update


class Checkpoint(ABC):
    """One checkpoint on disk; a layout is a subclass in a module of its own.

    Attributes
    ----------
    layout : str
        Name of the layout, shown to the user.
    path : Place
        The folder or file it was opened from.
    method : str
        How it was trained: ``ft``, ``lora``, ``dora``, …
    modules : frozenset of str
        Modules whose matrix it holds or changes, in its own spelling.
    required : frozenset of str
        Those of them that must exist in the base.
    unread : tuple of str
        Names of tensors it holds that mean nothing to this reader.
    base : str or None
        What it says it was fine-tuned from.
    tensors : Tensors
        Its tensors by name.
    """

    layout: ClassVar[str]

    path: Place
    method: str
    modules: frozenset[str]
    required: frozenset[str] = frozenset()
    unread: tuple[str, ...] = ()
    base: str | None = None
    tensors: Tensors

    @classmethod
    @abstractmethod
    def open(cls, path: Place) -> Self | None:
        """Open a folder or file of this layout, reading headers only; None if it is another's.

        Raises
        ------
        CheckpointError
            When it is of this layout but damaged, contradictory or of a kind not yet read.
        """

    @abstractmethod
    def holds_all(self) -> bool:
        """Tell whether a matrix that is absent here is missing rather than unchanged."""

    @abstractmethod
    def stored_shape(self, module: str, matrix: Matrix) -> tuple[int, int]:
        """Give the whole shape (out_features, in_features) of what it holds for a module."""

    @abstractmethod
    def update(self, module: str, matrix: Matrix) -> Update:
        """Give the update of a base matrix; ``module`` is its name in this checkpoint."""

    @abstractmethod
    def tensors_of(self, module: str) -> tuple[str, ...]:
        """Name the tensors that an update of a module's matrix is read from."""

    @property
    def files(self) -> list[Place]:
        """The files its numbers lie in, as far as they were opened."""
        return self.tensors.files

    def says_transposed(self, module: str, stored: tuple[int, int]) -> bool:  # noqa: ARG002
        """Tell whether it declares the base's matrix of this stored shape to be (in, out)."""
        return False

    @property
    def step(self) -> int | None:
        """Training step: from the folder's name, else from what the trainer wrote into it."""
        if match := re.fullmatch(r"checkpoint-(\d+)", self.path.name):
            return int(match.group(1))
        state = self.path / "trainer_state.json"
        if not state.is_file():
            return None
        step = read_json(state).get("global_step")
        return step if isinstance(step, int) else None
