"""Cuts a comparison into units of work, has them done side by side, and joins the results."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from torch import Tensor

from wda.changes import Change, Moved, Vectors, changes, head_size
from wda.checkpoints import FullCheckpoint
from wda.decomposition import Displacement, Per, join
from wda.engine import Part, alone, measure_part
from wda.floors import join_roundings
from wda.naming import Matrix
from wda.pairing import Pairing, Source
from wda.rows import row_blocks

DEFAULT_MEMORY = 512 << 20

# What one worker takes at the least: for numbers in float64, and what is computed from them.
WORKER_BYTES = 64 << 20

# Elements of W0, times updates of them, that one unit does: about a tenth of a second of work, so
# that units are many enough to be shared out and short enough to be waited for.
UNIT_ELEMENTS = 1 << 27

# Units that are handed out before one of them is done.
_MOST_PENDING = 1024


@dataclass(frozen=True)
class Measurement:
    """The change of one matrix of one checkpoint.

    Attributes
    ----------
    matrix : Matrix
        The matrix of the base.
    source : Source
        The checkpoint, and its name for the module.
    per : {"output", "input"}
        Which axis the vectors are.
    changes : tuple of Change
        The numbers of its rows.
    norms : Tensor
        m_0 of every vector of the matrix, in float64.
    move : Displacement or None
        How every vector moved, where that was asked for.
    """

    matrix: Matrix
    source: Source
    per: Per
    changes: tuple[Change, ...]
    norms: Tensor
    move: Displacement | None = None


@dataclass(frozen=True)
class Work:
    """How the units are done.

    Attributes
    ----------
    executor : concurrent.futures.Executor or None
        What runs them; None for threads, one per core as far as the memory goes.
    max_memory : int
        Bytes that those threads may take together, beside the pages of mapped files; each worker of
        an executor takes as much as one of the threads would.
    device : str
        Where to compute: ``cpu`` or a ``cuda`` device.
    """

    executor: Executor | None = None
    max_memory: int = DEFAULT_MEMORY
    device: str = "cpu"

    @property
    def workers(self) -> int:
        """How many threads there are."""
        return max(1, min(_cores(), self.max_memory // (2 * WORKER_BYTES)))

    @property
    def held_bytes(self) -> int:
        """Bytes that the updates of one unit may take, where they do not stay in mapped files."""
        return max(WORKER_BYTES, self.max_memory // self.workers - WORKER_BYTES)


@dataclass
class _Job:
    """One matrix: its units, and what came of them so far."""

    pairing: Pairing
    parts: list[Part]
    moved: dict[int, list[Moved]] = field(default_factory=dict)

    def measurements(self, vectors: Vectors, config: Mapping[str, Any]) -> list[Measurement]:
        """Put the parts together, when all are there."""
        found: list[Measurement] = []
        matrix = self.pairing.matrix
        size = head_size(matrix, config, vectors.per)
        for i, source in enumerate(self.pairing.sources):
            parts = [self.moved[k][i] for k in range(len(self.parts))]
            whole = Moved(
                parts[0].dtype,
                parts[0].base_dtype,
                join([part.move for part in parts]),
                join_roundings([part.rounding for part in parts]),
            )
            rows = tuple(changes(whole, vectors.granularity, size))
            norms = found[0].norms if found else whole.move.norm
            found.append(Measurement(matrix, source, vectors.per, rows, norms, whole.move))
        return found


def measure(
    base: FullCheckpoint,
    pairings: Sequence[Pairing],
    vectors: Vectors,
    work: Work,
    keep_moves: bool = False,
    on_part: Callable[[int, int, Matrix], None] = lambda _done, _total, _matrix: None,
    on_matrix: Callable[[list[Measurement]], None] = lambda _measurements: None,
) -> list[Measurement]:
    """Decompose every update of every matrix.

    Parameters
    ----------
    base : FullCheckpoint
        The pre-trained model.
    pairings : sequence of Pairing
        What is to be measured.
    vectors : Vectors
        What counts as a vector, and what has a row.
    work : Work
        How it is done. Whoever does it, the numbers are the same to the last bit.
    keep_moves : bool
        Whether the measurements keep how every vector moved.
    on_part : callable, optional
        Called after each unit, with how many are done, how many there are, and its matrix.
    on_matrix : callable, optional
        Called with the measurements of a matrix when they are complete.

    Returns
    -------
    list of Measurement
        In the order of the pairings, whatever order they finished in.
    """
    jobs = [_Job(pairing, cut(base, pairing, vectors.per, work)) for pairing in pairings]
    units = [(job, index) for job in jobs for index in range(len(job.parts))]
    found: dict[Matrix, list[Measurement]] = {}
    with _running(work) as executor:
        for done, (job, index, moved) in enumerate(_finished(executor, units), start=1):
            job.moved[index] = moved
            if len(job.moved) == len(job.parts):
                done_with = job.measurements(vectors, base.config)
                job.moved.clear()
                if not keep_moves:
                    done_with = [replace(one, move=None) for one in done_with]
                found[job.pairing.matrix] = done_with
                on_matrix(done_with)
            on_part(done, len(units), job.pairing.matrix)
    return [measurement for pairing in pairings for measurement in found[pairing.matrix]]


def cut(base: FullCheckpoint, pairing: Pairing, per: Per, work: Work) -> list[Part]:
    """Cut a matrix into units: blocks of rows, where its vectors lie in the rows as stored."""
    matrix, sources = pairing.matrix, pairing.sources
    blocks: Iterable[slice | None] = [None]
    whole = any(source.checkpoint.needs_whole(source.module) for source in sources)
    if per == "output" and not matrix.stored_transposed and not whole:
        elements = UNIT_ELEMENTS // len(sources)
        far = base.is_remote or any(source.checkpoint.is_remote for source in sources)
        if far or matrix.scattered:
            # What is fetched or gathered is held; four updates of 4-byte numbers fit at a time.
            elements = min(elements, work.held_bytes // 16)
        blocks = row_blocks(matrix.shape, elements)
    return [Part(base, matrix, sources, per, rows, work.held_bytes, work.device) for rows in blocks]


class _Sealed:
    """A unit on its way: where it is pickled, only the worker that does it opens it again.

    A scheduler between here and the worker unpickles what it hands on, and need not reach the
    files.
    """

    def __init__(self, part: Part) -> None:
        self._part: Part | bytes = part

    def __getstate__(self) -> bytes:
        return self._part if isinstance(self._part, bytes) else pickle.dumps(self._part)

    def __setstate__(self, state: bytes) -> None:
        self._part = state

    def open(self) -> Part:
        """Give the unit."""
        part = self._part
        return pickle.loads(part) if isinstance(part, bytes) else part


def _do(sealed: _Sealed) -> list[Moved]:
    return measure_part(sealed.open())


def _finished(
    executor: Executor, units: Iterable[tuple[_Job, int]]
) -> Iterator[tuple[_Job, int, list[Moved]]]:
    """Have the units done, and give each when it is; what has not begun at the end never does."""
    waiting, pending = iter(units), dict[Future[list[Moved]], tuple[_Job, int]]()
    try:
        while True:
            for job, index in islice(waiting, _MOST_PENDING - len(pending)):
                pending[executor.submit(_do, _Sealed(job.parts[index]))] = job, index
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                yield *pending.pop(future), future.result()
    finally:
        for future in pending:
            future.cancel()


@contextmanager
def _running(work: Work) -> Iterator[Executor]:
    """Give what runs the units: the executor that was given, or threads side by side.

    An interruption does not wait for the units under way.
    """
    with alone():
        if work.executor is not None:
            yield work.executor
            return
        threads = ThreadPoolExecutor(work.workers, "wda")
        try:
            yield threads
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def _cores() -> int:
    """Give the number of processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
