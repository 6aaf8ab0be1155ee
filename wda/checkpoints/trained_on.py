"""An adapter on the model that it was trained on, where that is not what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from wda.checkpoints.adapter import Adapter
from wda.checkpoints.checkpoint import Checkpoint
from wda.checkpoints.found import Found
from wda.checkpoints.full import FullCheckpoint
from wda.checkpoints.levels import spacings_of
from wda.errors import PairingError
from wda.naming import Matrix
from wda.places import Place
from wda.updates import Computed, Some


class TrainedOn(Checkpoint):
    """An adapter on a quantised model, to be compared with the model before it was quantised.

    Wt is what the adapter makes of the dequantised weights; W0 are the original ones, so that the
    change has the quantisation in it.

    Parameters
    ----------
    adapter : Adapter
        The adapter.
    model : FullCheckpoint
        The model it was trained on.
    """

    evidence = "what was asked for"

    def __init__(self, adapter: Adapter, model: FullCheckpoint) -> None:
        super().__init__(adapter.path, adapter.tensors, adapter.method, adapter.given)
        self.adapter, self.model = adapter, model
        self.layout = f"{adapter.layout}, on {model.quantised} weights"  # type: ignore[misc]
        self.modules, self.required, self.unread = adapter.modules, adapter.required, adapter.unread
        self.base, self.quantised = adapter.base, model.quantised

    @classmethod
    def open(cls, found: Found) -> None:
        """Recognise nothing: this is made of two checkpoints, not found."""

    def holds_all(self) -> bool:
        """Tell that an absent matrix is one the adapter leaves alone."""
        return False

    def names_in(self, base: FullCheckpoint) -> Mapping[str, str]:
        """Give the base's name of every module, by the adapter's own."""
        return self.adapter.names_in(base)

    def stored_shape(self, module: str, matrix: Matrix) -> tuple[int, int]:
        """Give the shape of what changes a module."""
        return self.adapter.stored_shape(module, matrix)

    def says_transposed(self, module: str, stored: tuple[int, int]) -> bool:
        """Tell what the adapter says."""
        return self.adapter.says_transposed(module, stored)

    def rank(self, module: str) -> int | None:  # noqa: ARG002
        """Give none, for the change has the quantisation in it, which no rank bounds."""
        return None

    def needs_whole(self, module: str) -> bool:
        """Tell whether the adapter asks for the whole of the weights it was trained on."""
        return self.adapter.needs_whole(module)

    def tensors_of(self, module: str) -> tuple[str, ...]:
        """Name the adapter's tensors."""
        return self.adapter.tensors_of(module)

    def update(
        self,
        module: str,
        matrix: Matrix,
        base: FullCheckpoint,  # noqa: ARG002
        rows: slice | None = None,
    ) -> Computed:
        """Give the update from W0 to the adapter's Wt."""
        if matrix.module not in self.model.modules:
            raise PairingError(
                f"{self.model.path}: has no {matrix.module}, which the base has; the model that "
                "the adapter was trained on must be the base, quantised"
            )
        start = self.model.weight(matrix.module, matrix, rows)
        update = self.adapter.update(module, matrix, self.model, rows)

        def form(w0: Tensor, some: Some) -> Tensor:
            wide = start[some].double()
            return wide - w0 + update.delta(wide, some)

        spacings = spacings_of(self.model.tensors, f"{matrix.module}.weight", matrix, rows)
        return Computed(update.shape, update.dtype, form, spacings)

    def held_bytes(
        self, module: str, matrix: Matrix, rows: slice | None = None, moved: bool = False
    ) -> int:
        """Give the memory of the adapter's update, and of the weights it is of."""
        count = len(range(*(rows or slice(None)).indices(matrix.shape[0])))
        own = self.adapter.held_bytes(module, matrix, rows, moved)
        return own + 8 * count * matrix.shape[1]

    def meaning(self, module: str) -> tuple[object, ...] | None:
        """Give what both depend on."""
        both = self.adapter.meaning(module), self.model.meaning(self._name(module))
        return None if None in both else both

    def require_unchanged(self, module: str) -> None:
        """Make sure that the files of both are those that were opened."""
        self.adapter.require_unchanged(module)
        self.model.require_unchanged(self._name(module))

    def __reduce__(  # type: ignore[override]
        self,
    ) -> tuple[Callable[..., Checkpoint], tuple[Adapter, FullCheckpoint]]:
        """Travel to another process as the two."""
        return TrainedOn, (self.adapter, self.model)

    @property
    def files(self) -> list[Place]:
        """The files of both."""
        return [*self.adapter.files, *self.model.files]

    def _name(self, module: str) -> str:
        """Give the model's name of a module of the adapter."""
        return self.adapter.names_in(self.model)[module]
