"""Takes the rows of W0 past all updates at once: the unit of work, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from wda.changes import Moved
from wda.checkpoints import FullCheckpoint
from wda.decomposition import Displacement, Per
from wda.errors import CheckpointError, DeviceError, blaming, listing
from wda.naming import Matrix
from wda.pairing import Source
from wda.remote import at_once
from wda.rows import Factors, Rows
from wda.updates import RowUpdate, Update


@dataclass(frozen=True)
class Part:
    """One unit of work: some rows of a matrix of the base, and every update of them.

    Attributes
    ----------
    base : FullCheckpoint
        The pre-trained model.
    matrix : Matrix
        A matrix of it.
    sources : tuple of Source
        Where the updates come from.
    per : {"output", "input"}
        Which axis the vectors are.
    rows : slice or None
        The rows of the matrix; None for all of it.
    memory : int
        Bytes that the updates may take at a time, where they do not stay in mapped files.
    device : str
        Where to compute: ``cpu`` or a ``cuda`` device.
    """

    base: FullCheckpoint
    matrix: Matrix
    sources: tuple[Source, ...]
    per: Per
    rows: slice | None
    memory: int
    device: str = "cpu"


def measure_part(part: Part) -> list[Moved]:
    """Tell how the vectors of a part move, once for each of its sources.

    Raises
    ------
    CheckpointError
        When base or checkpoint holds NaN or infinite numbers, or a file changed under the work.
    """
    _compute_alone()
    matrix, found = part.matrix, list[Moved]()
    with blaming(part.base.path):
        w0 = part.base.weight(matrix.module, matrix, part.rows).to(part.device)
    for group in _grouped(part):
        with blaming(listing(source.checkpoint.path for source in group)):
            updates = [update.to(part.device) for update in _read(group, part)]
            all_moved = moved(w0, updates, part.per)
        part.base.require_unchanged(matrix.module)
        for source, one in zip(group, all_moved, strict=True):
            source.checkpoint.require_unchanged(source.module)
            _require_finite(part.base, matrix, source, one.move)
            found.append(one)
    return found


def moved(w0: Tensor, updates: Sequence[Update], per: Per) -> list[Moved]:
    """Tell how the vectors of W0 move under each of several updates, reading W0 once.

    Parameters
    ----------
    w0 : Tensor
        The matrix, (out_features, in_features), in its stored dtype.
    updates : sequence of Update
        Updates of it.
    per : {"output", "input"}
        Which axis the vectors are.

    Returns
    -------
    list of Moved
        One per update, each with one entry per vector.
    """
    moving: Sequence[RowUpdate] = updates
    if per == "input":
        moving, rows_of_w0 = [update.transposed(w0) for update in updates], w0.T
    else:
        rows_of_w0 = w0
    factors = Factors([factor for update in moving for factor in update.factors])
    rows = Rows(rows_of_w0, factors, [end for update in moving for end in update.ends])
    return [
        Moved(
            _name(stored.dtype),
            _name(w0.dtype),
            update.displacement(rows).cpu(),
            update.rounding(rows).cpu(),
        )
        for stored, update in zip(updates, moving, strict=True)
    ]


def _grouped(part: Part) -> Iterator[list[Source]]:
    """Cut the sources where they would no longer fit into the memory; one always fits."""
    group: list[Source] = []
    used, moved = 0, part.device != "cpu"
    for source in part.sources:
        needed = source.checkpoint.held_bytes(source.module, part.matrix, part.rows, moved)
        if group and used + needed > part.memory:
            yield group
            group, used = [], 0
        group.append(source)
        used += needed
    if group:
        yield group


def usable_device(device: str) -> str:
    """Give the device, after making sure that it can be computed on.

    Raises
    ------
    DeviceError
        When it is not there, or is of a kind that has no float64.
    """
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise DeviceError(f"device: {device!r} is not one to compute on; give cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if int(number or 0) >= count:
        found = f"it finds {count}" if count else "it finds none"
        raise DeviceError(
            f"device: {device} is not there: torch {torch.__version__} was asked for CUDA devices "
            f"and {found}; leave --device out to compute on the processor"
        )
    return device


def _read(group: Sequence[Source], part: Part) -> list[Update]:
    """Read updates, side by side where they lie elsewhere."""

    def read(source: Source) -> Update:
        return source.checkpoint.update(source.module, part.matrix, part.base, part.rows)

    far = [source for source in group if source.checkpoint.is_remote]
    fetched = dict(zip(map(id, far), at_once(read, far), strict=True))
    return [fetched.get(id(source)) or read(source) for source in group]


def _require_finite(
    base: FullCheckpoint, matrix: Matrix, source: Source, move: Displacement
) -> None:
    if not torch.isfinite(move.norm).all():
        raise CheckpointError(
            f"{base.path}: {matrix.module} holds NaN or Inf; a base with such numbers cannot be "
            "compared with; download it again"
        )
    bad = ~(torch.isfinite(move.along) & torch.isfinite(move.across))
    if bad.any():
        raise CheckpointError(
            f"{source.checkpoint.path}: {source.module} holds NaN or Inf in "
            f"{int(bad.sum())} of {bad.numel()} vectors; the training diverged here "
            "or the file is damaged; leave this checkpoint out"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def alone() -> Iterator[None]:
    """Keep torch and BLAS from starting threads beneath those that do the units, for a while.

    Units run side by side. Threads beneath them would only wait for each other.
    """
    before = torch.get_num_threads()
    with _libraries().limit(limits=1, user_api="blas"):
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _compute_alone() -> None:
    """Do the same in the thread, and the process, that a unit finds itself in."""
    torch.set_num_threads(1)
    _libraries().limit(limits=1, user_api="blas")


@lru_cache(maxsize=1)
def _libraries() -> ThreadpoolController:
    import scipy.linalg.cython_blas  # noqa: F401, PLC0415 - the BLAS that the kernels call

    return ThreadpoolController()
