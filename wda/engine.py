"""Streams the rows of W0 past all updates at once, one matrix of the base at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass

import torch
from torch import Tensor

from wda.checkpoints import FullCheckpoint
from wda.decomposition import Decomposition, Displacement, Per, decomposition, join
from wda.errors import CheckpointError
from wda.naming import Matrix
from wda.pairing import Pairing, Source
from wda.rows import Factors, Rows, row_blocks
from wda.updates import RowUpdate, Update


@dataclass(frozen=True)
class Measurement:
    """The change of one matrix of one checkpoint, in the numbers of a table's row."""

    matrix: Matrix
    source: Source
    per: Per
    dtype: str
    base_dtype: str
    n_vectors: int
    n_undirected: int
    delta_m: float
    delta_d: float


def displacements(w0: Tensor, updates: Sequence[Update], per: Per) -> list[Displacement]:
    """Tell how the vectors of W0 move under each of several updates, reading W0 once.

    Parameters
    ----------
    w0 : Tensor
        The whole matrix, (out_features, in_features), in its stored dtype.
    updates : sequence of Update
        Updates of it.
    per : {"output", "input"}
        Which axis the vectors are.

    Returns
    -------
    list of Displacement
        One per update, each with one entry per vector.
    """
    moving: Sequence[RowUpdate] = updates
    if per == "input":
        moving, w0 = [update.transposed(w0) for update in updates], w0.T
    parts: list[list[Displacement]] = [[] for _ in moving]
    factors = Factors([factor for update in moving for factor in update.factors])
    for block in row_blocks((w0.shape[0], w0.shape[1])):
        rows = Rows(w0[block].contiguous(), factors)
        for update, moves in zip(moving, parts, strict=True):
            moves.append(update.rows(block).displacement(rows))
    return [join(moves) for moves in parts]


def measure_pairing(base: FullCheckpoint, pairing: Pairing, per: Per) -> list[Measurement]:
    """Decompose every update of one matrix of the base.

    Raises
    ------
    CheckpointError
        When the base or a checkpoint holds NaN or infinite numbers.
    """
    matrix = pairing.matrix
    w0 = base.update(matrix.module, matrix).weight
    updates = [source.update(matrix) for source in pairing.sources]
    moves = displacements(w0, updates, per)
    for source, move in zip(pairing.sources, moves, strict=True):
        _require_finite(base, matrix, source, move)
    return [
        _summary(matrix, source, per, (update.dtype, w0.dtype), decomposition(move))
        for source, update, move in zip(pairing.sources, updates, moves, strict=True)
    ]


def _summary(
    matrix: Matrix,
    source: Source,
    per: Per,
    dtypes: tuple[torch.dtype, torch.dtype],
    change: Decomposition,
) -> Measurement:
    """Keep what a row of the table needs; the single vectors would fill the memory."""
    dtype, base_dtype = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return Measurement(
        matrix=matrix,
        source=source,
        per=per,
        dtype=dtype,
        base_dtype=base_dtype,
        n_vectors=change.n_vectors,
        n_undirected=change.n_undirected,
        delta_m=change.delta_m,
        delta_d=change.delta_d,
    )


def measure(
    base: FullCheckpoint,
    pairings: Iterable[Pairing],
    per: Per,
    executor: Executor | None = None,
    on_done: Callable[[Pairing], None] = lambda _pairing: None,
) -> list[Measurement]:
    """Decompose every update of every matrix.

    Parameters
    ----------
    base : FullCheckpoint
        The pre-trained model.
    pairings : iterable of Pairing
        The work; one unit per matrix of the base.
    per : {"output", "input"}
        Which axis the vectors are.
    executor : concurrent.futures.Executor, optional
        What runs the units; by default they run here, one after another.
    on_done : callable, optional
        Called after each unit.

    Returns
    -------
    list of Measurement
        In the order of the units, whatever order they finished in.
    """
    todo = list(pairings)
    done: dict[int, list[Measurement]] = {}
    for index, measurements in _run(base, todo, per, executor):
        done[index] = measurements
        on_done(todo[index])
    return [measurement for index in sorted(done) for measurement in done[index]]


def _run(
    base: FullCheckpoint, todo: Sequence[Pairing], per: Per, executor: Executor | None
) -> Iterator[tuple[int, list[Measurement]]]:
    if executor is None:
        yield from ((i, measure_pairing(base, pairing, per)) for i, pairing in enumerate(todo))
        return
    futures = {executor.submit(measure_pairing, base, p, per): i for i, p in enumerate(todo)}
    for future in as_completed(futures):
        yield futures[future], future.result()


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
            f"{source.member.checkpoint.path}: {source.module} holds NaN or Inf in "
            f"{int(bad.sum())} of {bad.numel()} vectors; the training diverged here "
            "or the file is damaged; leave this checkpoint out"
        )
