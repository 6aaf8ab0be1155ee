"""Forms that lie beside a weight of their own in the file: W0 itself, or what may be merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wda.checkpoints.forms import Form, Stored, Wanted
from wda.errors import CheckpointError
from wda.updates import Computed, Some, Update, merged


@dataclass(frozen=True)
class _Beside(Form):
    """A change and a weight in one file.

    Attributes
    ----------
    change : Form
        The change.
    weight : Stored
        The weight beside it.
    """

    change: Form
    weight: Stored

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The tensors of the change, and the weight."""
        return *self.change.parts, self.weight

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """(out_features, in_features)."""
        return self.change.shape

    @property
    def rank(self) -> int | None:
        """Rank of the factors."""
        return self.change.rank

    @property
    def scale(self) -> float | None:
        """The factor s in front."""
        return self.change.scale

    @property
    def told(self) -> tuple[object, ...]:
        """What the change depends on."""
        return *super().told, *self.change.told

    def held_bytes(self, vectors: int, features: int) -> int:
        """Give the memory of the change and of the weight, in float64."""
        return self.change.held_bytes(vectors, features) + 8 * vectors * features


@dataclass(frozen=True)
class OnOwnStart(_Beside):
    """A change of the W0 that lies beside it."""

    @property
    def words(self) -> str:  # type: ignore[override]
        """What Wt is made of."""
        return f"{self.change.words}, on a W0 of its own"

    def update(self, wanted: Wanted) -> Computed:
        """Give Wt − W0, with Wt made from the W0 in the file."""
        change, start = self.change.update(wanted), self.weight.read(wanted.stored_rows)

        def form(w0: Tensor, some: Some) -> Tensor:
            own = start[some].double()
            return own + change.delta(own, some) - w0

        return Computed(wanted.shape, change.dtype, form)


@dataclass(frozen=True)
class PerhapsMerged(_Beside):
    """A change beside a weight that is W0, or has the change merged into it already."""

    @property
    def words(self) -> str:  # type: ignore[override]
        """What Wt is made of."""
        return f"{self.change.words}, merged into the weight or not"

    def update(self, wanted: Wanted) -> Update:
        """Give the change of W0, once the weight is known to be W0 with or without it.

        Raises
        ------
        CheckpointError
            When it is neither.
        """
        change, name = self.change.update(wanted), self.weight.name
        held = self.weight.tensors.read_matrix(name, wanted.matrix, wanted.rows)
        w0 = wanted.base.weight(wanted.matrix.module, wanted.matrix, wanted.rows)
        wt = merged(change, w0)
        coarsest = max(torch.finfo(t.dtype).eps for t in (held, w0, *change.factors))
        allowed = 4 * coarsest * (w0.double().norm() + wt.norm())
        to_w0, to_wt = (float((held.double() - of).norm()) for of in (w0.double(), wt))
        if min(to_w0, to_wt) > allowed:
            raise CheckpointError(
                f"{self.weight.tensors.files[0]}: {name} is neither the base's nor has the factors "
                f"beside it merged in (s = {self.scale:g}); give the base it was trained on, and "
                "its own --alpha"
            )
        return change
