"""What every layout on disk is read as: named modules, each with an update of its matrix."""

from __future__ import annotations

import platform
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from wda.checkpoints.found import Found
from wda.checkpoints.given import Given
from wda.checkpoints.tensors import ALL, Tensors, read_json
from wda.errors import CheckpointError, WdaError
from wda.naming import Matrix, align
from wda.places import Place
from wda.remote import RemotePlace
from wda.updates import Update

if TYPE_CHECKING:
    from wda.checkpoints.full import FullCheckpoint

_STEP_FOLDER = re.compile(r"checkpoint-(\d+)")


class Checkpoint(ABC):
    """One checkpoint on disk; a layout is a subclass in a module of its own.

    Attributes
    ----------
    layout, evidence : str
        Name of the layout, and what it is told by, shown to the user.
    step_files : re.Pattern or None
        How it names the files of a run's steps, where each is a file, with the step in a group.
    path : Place
        The folder or file it was opened from.
    method : str
        How it was trained: ``ft``, ``lora``, ``dora``, …
    modules : frozenset of str
        Modules whose matrix it holds or changes, in its own spelling.
    required : frozenset of str
        Those of them that must exist in the base.
    unread : tuple of str
        Names of tensors it holds beside the matrices, or that mean nothing to this reader.
    base : str or None
        What it says it was fine-tuned from.
    tensors : Tensors
        Its tensors by name.
    given : Given
        What the user said of it.
    quantised : str or None
        How its weights are packed, where they are: ``nf4``, ``awq``, …; of an adapter, those of the
        base that lie beside it.
    """

    layout: ClassVar[str]
    evidence: ClassVar[str]
    step_files: ClassVar[re.Pattern[str] | None] = None

    modules: frozenset[str]
    required: frozenset[str] = frozenset()
    unread: tuple[str, ...] = ()
    base: str | None = None
    quantised: str | None = None
    _token: str = ""

    def __init__(self, path: Place, tensors: Tensors, method: str, given: Given) -> None:
        self.path, self.tensors, self.method, self.given = path, tensors, method, given

    @classmethod
    @abstractmethod
    def open(cls, found: Found) -> Self | None:
        """Open what is of this layout, reading headers only; None if it is another's.

        Raises
        ------
        CheckpointError
            When it is of this layout but damaged, contradictory or of a kind that cannot be read,
            or the user has to say more of it.
        """

    @abstractmethod
    def holds_all(self) -> bool:
        """Tell whether a matrix that is absent here is missing rather than unchanged."""

    @abstractmethod
    def stored_shape(self, module: str, matrix: Matrix) -> tuple[int, int]:
        """Give the whole shape (out_features, in_features) of what it holds for a module."""

    @abstractmethod
    def update(
        self, module: str, matrix: Matrix, base: FullCheckpoint, rows: slice | None = None
    ) -> Update:
        """Give the update of a base matrix, or of some of its rows.

        Parameters
        ----------
        module : str
            The matrix's module by its name in this checkpoint.
        matrix : Matrix
            The matrix of the base.
        base : FullCheckpoint
            The base, whose weights some updates start from.
        rows : slice, optional
            Rows of it; where the checkpoint lies elsewhere, no others are fetched.
        """

    def rank(self, module: str) -> int | None:  # noqa: ARG002
        """Give the rank that a module's update cannot exceed; None where nothing bounds it."""
        return None

    def needs_whole(self, module: str) -> bool:  # noqa: ARG002
        """Tell whether an update of some rows can be told only from the whole of W0."""
        return False

    def names_in(self, base: FullCheckpoint) -> Mapping[str, str]:
        """Give the base's name of every module it holds, by its own.

        Raises
        ------
        PairingError
            When no name is common to both.
        """
        rename = align(self.modules, base.modules)
        return {module: rename(module) for module in sorted(self.modules)}

    @abstractmethod
    def tensors_of(self, module: str) -> tuple[str, ...]:
        """Name the tensors that an update of a module's matrix is read from."""

    def held_bytes(
        self, module: str, matrix: Matrix, rows: slice | None = None, moved: bool = False
    ) -> int:
        """Give the memory that an update takes while it is used.

        Parameters
        ----------
        module : str
            The matrix's module by its name in this checkpoint.
        matrix : Matrix
            The matrix of the base.
        rows : slice, optional
            Rows of it.
        moved : bool
            Whether it is moved to a device. Where it is not, what stays mapped takes none.
        """
        held = moved or matrix.scattered
        names = [n for n in self.tensors_of(module) if held or self.tensors.is_remote(n)]
        share = len(range(*(rows or ALL).indices(matrix.shape[0])))
        return sum(self.tensors[name].nbytes for name in names) * share // matrix.stored_shape[0]

    def meaning(self, module: str) -> tuple[object, ...] | None:
        """Give all that an update of a module depends on: its tensors, how and in what files.

        Where this is the same, the update is the same. None where a file elsewhere has no mark, so
        that no one can tell.
        """
        stored = [(n, self.tensors[n], self.tensors.state(n)) for n in self.tensors_of(module)]
        if any(None in state for _, _, state in stored):
            return None
        return (self.layout, *((n, entry.shape, entry.stored, state) for n, entry, state in stored))

    @property
    def is_remote(self) -> bool:
        """Whether it lies on another machine."""
        return isinstance(self.path, RemotePlace)

    def require_unchanged(self, module: str) -> None:
        """Make sure that the files a module is read from are those that were opened.

        Raises
        ------
        CheckpointError
            When one has changed or is gone.
        """
        self.tensors.require_unchanged(self.tensors_of(module))

    def __reduce__(self) -> tuple[Callable[[_Reference], Checkpoint], tuple[_Reference]]:
        """Travel to another process as the place it lies at, to be opened there once."""
        self._token = self._token or uuid.uuid4().hex
        place = self.path if isinstance(self.path, RemotePlace) else Path(str(self.path)).absolute()
        sizes = self.tensors.sizes
        return _open_once, (_Reference(self._token, type(self), place, self.given, sizes),)

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
        if (step := step_in(self.path.name, type(self))) is not None:
            return step
        state = self.path / "trainer_state.json"
        if not state.is_file():
            return None
        step = read_json(state).get("global_step")
        return step if isinstance(step, int) else None


def step_in(name: str, *layouts: type[Checkpoint]) -> int | None:
    """Give the training step that a file or folder of one of these layouts has in its name."""
    patterns = [_STEP_FOLDER, *(layout.step_files for layout in layouts)]
    found = (pattern.fullmatch(name) for pattern in patterns if pattern is not None)
    return next((int(match.group(1)) for match in found if match), None)


@dataclass(frozen=True)
class _Reference:
    """A checkpoint that another process has opened.

    Attributes
    ----------
    token : str
        What it is known by, so that it is opened once for all its matrices.
    layout : type
        The class that reads it.
    place : Place
        Where it lies.
    given : Given
        What the user said of it.
    sizes : tuple
        The sizes of its files, as far as they are on this machine.
    """

    token: str
    layout: type[Checkpoint] = field(compare=False)
    place: Place = field(compare=False)
    given: Given = field(compare=False)
    sizes: tuple[object, ...] = field(compare=False)


@lru_cache(maxsize=256)
def _open_once(reference: _Reference) -> Checkpoint:
    """Open a checkpoint in a worker, as it was in the process that sends it.

    Raises
    ------
    CheckpointError
        When it is not there, or another.
    """
    try:
        found = reference.layout.open(Found(reference.place, reference.given))
    except WdaError as error:
        raise CheckpointError(f"on the worker {platform.node()}: {error}") from None
    if found is None or found.tensors.sizes != reference.sizes:
        raise CheckpointError(
            f"{reference.place}: the worker {platform.node()} finds "
            f"{'nothing' if found is None else 'other files'} there; workers must reach the same "
            "files at the same place"
        )
    return found
