"""Whole models of trainers that name, fuse and order their matrices otherwise than Hugging Face."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch

from wda.checkpoints.forms import Stored
from wda.checkpoints.full import FullCheckpoint
from wda.naming import Matrix, align, pick
from wda.updates import Dense


class RespelledModel(FullCheckpoint):
    """A whole model that is compared with its own layout, or with Hugging Face's.

    Against the latter a module may be some rows of a tensor, or several tensors one behind the
    other, and goes by a path that says so.
    """

    @abstractmethod
    def paths_in(self, base: FullCheckpoint) -> Mapping[str, str] | None:
        """Give Hugging Face's path of every module, by its own; None for a base of this layout."""

    def pieces(self, module: str) -> tuple[Stored, ...]:
        """Give the tensors of a module, one behind the other."""
        return (Stored(self.tensors, f"{module}.weight"),)

    def placed(self, module: str, base: FullCheckpoint) -> tuple[Stored, ...]:  # noqa: ARG002
        """Give them in the order of the base's rows, where the base has to tell it."""
        return self.pieces(module)

    def gathers(self, module: str) -> bool:
        """Tell whether rows of a module are picked from whole tensors."""
        return module not in self.modules

    def names_in(self, base: FullCheckpoint) -> Mapping[str, str]:
        """Give the base's name of every module."""
        paths = self.paths_in(base)
        if paths is None:
            return super().names_in(base)
        rename = align(paths.values(), base.modules)
        return {module: rename(path) for module, path in paths.items()}

    def stored_shape(self, module: str, matrix: Matrix) -> tuple[int, int]:
        """Give the shape of all pieces together."""
        if module in self.modules:
            return super().stored_shape(module, matrix)
        pieces = self.pieces(module)
        return sum(piece.shape[0] for piece in pieces), pieces[0].shape[1]

    def update(
        self, module: str, matrix: Matrix, base: FullCheckpoint, rows: slice | None = None
    ) -> Dense:
        """Give Wt in the order of the base's rows."""
        for name in self.tensors_of(module):
            self._entry(name.removesuffix(".weight"))
        pieces, wanted = self.placed(module, base), matrix.rows_of_stored(rows)
        if len(pieces) == 1:
            return Dense(pieces[0].read(wanted))
        return Dense(pick(torch.cat([piece.read() for piece in pieces]), wanted))

    def tensors_of(self, module: str) -> tuple[str, ...]:
        """Name the tensors of a module."""
        return tuple(piece.name for piece in self.pieces(module))

    def held_bytes(
        self, module: str, matrix: Matrix, rows: slice | None = None, moved: bool = False
    ) -> int:
        """Give the memory of all of its tensors, of which the rows are picked."""
        if not self.gathers(module):
            return super().held_bytes(module, matrix, rows, moved)
        return sum(self.tensors[name].nbytes for name in self.tensors_of(module))

    def meaning(self, module: str) -> tuple[object, ...] | None:
        """Give what all models tell, and which rows these are."""
        stored = super().meaning(module)
        return stored and (*stored, *(piece.told for piece in self.pieces(module)))
