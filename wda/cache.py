"""Results computed before, found again by all that they depend on: nothing is computed twice.

One SQLite file holds the numbers of every matrix of every checkpoint that was ever measured, and
the norms of its vectors in the base. Each lies under a digest of the tensors' places and stored
forms, of the files' sizes and times of change, of the options, and of the code that makes the
numbers. What has changed in any of them is simply not found. Several processes may share the file.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from platformdirs import user_cache_path

from wda.changes import Change, Vectors, head_size
from wda.checkpoints import FullCheckpoint
from wda.errors import OutputError
from wda.naming import Matrix
from wda.pairing import Pairing, Source
from wda.schedule import Measurement

FILE = "results-2.sqlite"

# The code that the numbers come from. Where it has changed, they are computed anew.
_NUMBERS_FROM = (
    "kernels",
    "rows",
    "decomposition",
    "floors",
    "changes",
    "naming",
    "engine",
    "schedule",
)

_SECONDS_BETWEEN_COMMITS = 0.5
_SECONDS_TO_WAIT = 30  # while another process writes


class ResultCache:
    """The results that are kept; see :func:`open_cache`."""

    def __init__(
        self,
        database: sqlite3.Connection | None,
        base: FullCheckpoint,
        vectors: Vectors,
        device: str,
        trouble: str | None = None,
    ) -> None:
        self._database = database
        self._base, self._vectors, self._device = base, vectors, device
        self._new: list[tuple[bytes, str | bytes]] = []
        self._committed = time.monotonic()
        self.trouble = trouble

    def split(self, pairings: Sequence[Pairing]) -> tuple[list[Measurement], list[Pairing]]:
        """Give what is known of a comparison, and what is left to be measured."""
        if self._database is None:
            return [], list(pairings)
        known, left = [], []
        for pairing in pairings:
            unknown, matrix = [], pairing.matrix
            norms = self._find(self._key(matrix))
            for source in pairing.sources:
                found = self._find(self._key(matrix, source))
                if found is None or norms is None:
                    unknown.append(source)
                else:
                    rows = tuple(Change(**row) for row in json.loads(found))
                    m_0 = torch.frombuffer(bytearray(norms), dtype=torch.float64)
                    known.append(Measurement(matrix, source, self._vectors.per, rows, m_0))
            if unknown:
                left.append(Pairing(pairing.matrix, tuple(unknown)))
        return known, left

    def keep(self, measurements: Iterable[Measurement]) -> None:
        """Keep results, on disk within half a second as long as more of them come."""
        if self._database is None:
            return
        for m in measurements:
            key, of_base = self._key(m.matrix, m.source), self._key(m.matrix)
            if key is not None and of_base is not None:
                self._new.append((key, json.dumps([asdict(change) for change in m.changes])))
                self._new.append((of_base, m.norms.numpy().tobytes()))
        if time.monotonic() - self._committed > _SECONDS_BETWEEN_COMMITS:
            self.commit()

    def commit(self) -> None:
        """Write what is new."""
        if self._database is None or not self._new:
            return
        try:
            with self._database:
                self._database.executemany(
                    "INSERT OR REPLACE INTO results VALUES (?, ?)", self._new
                )
        except sqlite3.Error as error:
            self._give_up(error)
        self._new.clear()
        self._committed = time.monotonic()

    def _find(self, key: bytes | None) -> Any:
        if key is None or self._database is None:
            return None
        try:
            query = self._database.execute("SELECT result FROM results WHERE key = ?", (key,))
            row = query.fetchone()
        except sqlite3.Error as error:
            self._give_up(error)
            return None
        return row[0] if row else None

    def _key(self, matrix: Matrix, source: Source | None = None) -> bytes | None:
        """Digest all that a result depends on, or the norms of the base's own vectors.

        None where a far file tells nothing of itself.
        """
        meanings = [self._base.meaning(matrix.module)]
        stored = (matrix.stored_transposed, matrix.stored_shape, matrix.part)
        how: tuple[object, ...] = (*stored, self._vectors.per, self._device)
        if source is not None:
            meanings.append(source.checkpoint.meaning(source.module))
            size = head_size(matrix, self._base.config, self._vectors.per)
            how = (*how, self._vectors.granularity, size)
        if None in meanings:
            return None
        return hashlib.sha256(repr((_code(), how, meanings)).encode()).digest()

    def _give_up(self, error: sqlite3.Error) -> None:
        """Go on without: what is lost is time, the next time."""
        self.trouble = str(error)
        self._database = None


@contextmanager
def open_cache(
    where: str | Path | Literal[False] | None,
    base: FullCheckpoint,
    vectors: Vectors,
    device: str,
) -> Iterator[ResultCache]:
    """Open the results kept in a folder, and write what is new to it in the end, come what may.

    Parameters
    ----------
    where : path, False or None
        The folder; False for none; None for the user's cache folder, where what cannot be opened
        is no error, only remembered as ``trouble``.
    base : FullCheckpoint
        What all results are measured against.
    vectors : Vectors
        What counts as a vector, and what has a row.
    device : str
        Where the results are computed.

    Raises
    ------
    OutputError
        When the folder that was named cannot be used.
    """
    if where is False:
        yield ResultCache(None, base, vectors, device)
        return
    file = (user_cache_path("wda") if where is None else Path(where).expanduser()) / FILE
    database, trouble = None, None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        database = _connect(file)
    except (OSError, sqlite3.Error) as error:
        why = f"{file}: {getattr(error, 'strerror', None) or error}"
        if where is not None:
            raise OutputError(
                f"{why}; results cannot be kept there: choose another folder for --cache, delete "
                "the file if it is damaged, or use --no-cache"
            ) from None
        trouble = why
    cache = ResultCache(database, base, vectors, device, trouble)
    try:
        yield cache
    finally:
        cache.commit()
        if database is not None:
            database.close()


def _connect(file: Path) -> sqlite3.Connection:
    database = sqlite3.connect(file, timeout=_SECONDS_TO_WAIT)
    try:
        with database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS results (key BLOB PRIMARY KEY, result NOT NULL) "
                "WITHOUT ROWID"
            )
    except sqlite3.Error:
        database.close()
        raise
    return database


@lru_cache(maxsize=1)
def _code() -> str:
    package = Path(__file__).parent
    files = [*(package / f"{room}.py" for room in _NUMBERS_FROM)]
    digest = hashlib.sha256()
    rooms = (package / room for room in ("updates", "checkpoints"))
    for file in [*files, *(file for room in rooms for file in sorted(room.rglob("*.py")))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()
