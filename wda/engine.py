"""Streams the rows of W0 past all updates at once, one matrix of the base at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
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

# What one worker takes for blocks of W0 in float64 and what is computed from them (measured), and
# again as much for low-rank factors, where no more is allowed.
WORKER_BYTES = 64 << 20

DEFAULT_MEMORY = 512 << 20


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


def displacements(
    w0: Tensor, updates: Sequence[Update], per: Per, factor_bytes: int = WORKER_BYTES
) -> list[Displacement]:
    """Tell how the vectors of W0 move under each of several updates, reading W0 once.

    W0 is read once more for every ``factor_bytes`` of low-rank factors, which are held in memory.

    Parameters
    ----------
    w0 : Tensor
        The whole matrix, (out_features, in_features), in its stored dtype.
    updates : sequence of Update
        Updates of it.
    per : {"output", "input"}
        Which axis the vectors are.
    factor_bytes : int
        Memory for the low-rank factors of several updates together.

    Returns
    -------
    list of Displacement
        One per update, each with one entry per vector.
    """
    moving: Sequence[RowUpdate] = updates
    if per == "input":
        moving, w0 = [update.transposed(w0) for update in updates], w0.T
    groups = _grouped(moving, factor_bytes)
    return [move for group in groups for move in _stream(w0, group)]


def _grouped(updates: Sequence[RowUpdate], factor_bytes: int) -> Iterator[list[RowUpdate]]:
    """Cut a sequence of updates where their factors would no longer fit; one always fits."""
    group: list[RowUpdate] = []
    used = 0
    for update in updates:
        needed = sum(8 * factor.numel() for factor in update.factors)
        if group and used + needed > factor_bytes:
            yield group
            group, used = [], 0
        group.append(update)
        used += needed
    if group:
        yield group


def _stream(w0: Tensor, updates: Sequence[RowUpdate]) -> list[Displacement]:
    """Take the rows of W0 past the updates, a block at a time."""
    parts: list[list[Displacement]] = [[] for _ in updates]
    factors = Factors([factor for update in updates for factor in update.factors])
    for block in row_blocks((w0.shape[0], w0.shape[1])):
        rows = Rows(w0[block].contiguous(), factors)
        for update, moves in zip(updates, parts, strict=True):
            moves.append(update.rows(block).displacement(rows))
    return [join(moves) for moves in parts]


def measure_pairing(
    base: FullCheckpoint, pairing: Pairing, per: Per, factor_bytes: int = WORKER_BYTES
) -> list[Measurement]:
    """Decompose every update of one matrix of the base.

    Raises
    ------
    CheckpointError
        When the base or a checkpoint holds NaN or infinite numbers.
    """
    matrix = pairing.matrix
    w0 = base.update(matrix.module, matrix).weight
    updates = [source.update(matrix) for source in pairing.sources]
    moves = displacements(w0, updates, per, factor_bytes)
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
    max_memory: int = DEFAULT_MEMORY,
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
        What runs the units; by default threads, one per core as far as the memory goes.
    max_memory : int
        Bytes that the threads may take together, beside the pages of mapped files.
    on_done : callable, optional
        Called after each unit.

    Returns
    -------
    list of Measurement
        In the order of the units, whatever order they finished in.
    """
    todo = list(pairings)
    workers = max(1, min(_cores(), max_memory // (2 * WORKER_BYTES)))
    factor_bytes = max(WORKER_BYTES, max_memory // workers - WORKER_BYTES)
    done: dict[int, list[Measurement]] = {}
    with nullcontext(executor) if executor else _threads(workers) as running:
        futures = {
            running.submit(measure_pairing, base, pairing, per, factor_bytes): index
            for index, pairing in enumerate(todo)
        }
        try:
            for future in as_completed(futures):
                index = futures[future]
                done[index] = future.result()
                on_done(todo[index])
        except BaseException:  # also Ctrl-C: what has not begun need not begin
            for future in futures:
                future.cancel()
            raise
    return [measurement for index in sorted(done) for measurement in done[index]]


@contextmanager
def _threads(workers: int) -> Iterator[Executor]:
    """Give threads that compute side by side, each with one thread of torch's own.

    Torch's own threads wait for each other at every small step; whole matrices need not.
    """
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    """Give the number of processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


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
