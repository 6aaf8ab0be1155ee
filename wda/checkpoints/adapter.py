"""What adapters have in common, whatever they store: a form of change for every module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from wda.checkpoints.checkpoint import Checkpoint
from wda.checkpoints.forms import Form, Wanted, Whole
from wda.checkpoints.found import Found
from wda.checkpoints.full import FullCheckpoint
from wda.checkpoints.tensors import Tensors
from wda.naming import Matrix
from wda.updates import Update


class Adapter(Checkpoint):
    """An adapter: what it does not name it leaves alone.

    Parameters
    ----------
    found : Found
        What it was told by.
    tensors : Tensors
        Its tensors by name.
    forms : mapping
        Module → how its change is stored.
    method : str
        How it was trained: ``lora``, ``dora``, …
    accounted : iterable of str
        Names of tensors outside the forms that need none: copies of W0, and numbers that went into
        the forms. Whatever else is in no form counts as not read.
    base : str or None
        What it says it was trained on.
    """

    def __init__(
        self,
        found: Found,
        tensors: Tensors,
        forms: Mapping[str, Form],
        method: str,
        accounted: Iterable[str] = (),
        base: str | None = None,
    ) -> None:
        super().__init__(found.path, tensors, method, found.given)
        self.forms, self.base, self.quantised = dict(forms), base, found.quantised
        self.accounted = frozenset(accounted)
        known = self.accounted | {part.name for form in forms.values() for part in form.parts}
        self.unread = tuple(name for name in tensors if name not in known)
        self.modules = frozenset(forms)
        # Modules that are trained whole beside the adapter may be new ones, such as heads.
        self.required = frozenset(m for m, form in forms.items() if not isinstance(form, Whole))

    def holds_all(self) -> bool:
        """Tell that an absent matrix is one the adapter leaves alone."""
        return False

    def stored_shape(self, module: str, matrix: Matrix) -> tuple[int, int]:
        """Give the shape of what changes a module; what only the base knows is the base's."""
        form = self.forms[module]
        if isinstance(form, Whole) and matrix.stored_transposed:
            return form.shape[1], form.shape[0]
        known = zip(form.shape, matrix.stored_shape, strict=True)
        rows, features = (of_base if own is None else own for own, of_base in known)
        return rows, features

    def update(
        self, module: str, matrix: Matrix, base: FullCheckpoint, rows: slice | None = None
    ) -> Update:
        """Read the update of a matrix, or of some of its rows."""
        return self.forms[module].update(Wanted(matrix, base, rows))

    def rank(self, module: str) -> int | None:
        """Give the rank of the form's factors, where it has some."""
        return self.forms[module].rank

    def needs_whole(self, module: str) -> bool:
        """Tell whether the form asks for the whole of W0."""
        return self.forms[module].needs_whole

    def held_bytes(
        self, module: str, matrix: Matrix, rows: slice | None = None, moved: bool = False
    ) -> int:
        """Give the memory of the update; of a weight trained whole as of any stored matrix."""
        form = self.forms[module]
        if isinstance(form, Whole):
            return super().held_bytes(module, matrix, rows, moved)
        share = len(range(*(rows or slice(None)).indices(matrix.shape[0])))
        return form.held_bytes(share, matrix.shape[1])

    def meaning(self, module: str) -> tuple[object, ...] | None:
        """Give what the form depends on, beside what all layouts tell."""
        stored = super().meaning(module)
        return stored and (*stored, *self.forms[module].told)

    def tensors_of(self, module: str) -> tuple[str, ...]:
        """Name the tensors of the form, as far as they are its own."""
        parts = self.forms[module].parts
        return tuple(part.name for part in parts if part.tensors is self.tensors)
