"""Writing files so that they appear whole or not at all, and telling what bytes a file holds."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from wda.errors import OutputError
from wda.places import Place
from wda.remote import RemotePlace

# What the names of scratch folders begin with.
_SCRATCH = ".wda-"


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Give a scratch folder whose files move into ``out`` when the block ends well.

    When it ends badly nothing has moved, and a folder made for it is taken away again.

    Raises
    ------
    OutputError
        When ``out`` cannot be written to, or the disk is full.
    """
    first_new = _first_missing(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=out))
    except OSError as error:
        raise OutputError(
            f"{out}: cannot be written to: {error.strerror}; choose another folder"
        ) from None
    try:
        yield scratch
        for file in sorted(scratch.iterdir()):
            file.replace(out / file.name)
        first_new = None
    except OSError as error:
        # A full disk names no file; an error about a file elsewhere is not ours to explain.
        if error.filename is not None and not str(error.filename).startswith(str(out)):
            raise
        raise OutputError(
            f"{out}: writing failed: {error.strerror}; make room or choose another folder"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if first_new is not None:
            shutil.rmtree(first_new, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all.

    Raises
    ------
    OutputError
        When the place cannot be written to.
    """
    with staged_folder(path.parent) as scratch:
        (scratch / path.name).write_text(text, encoding="utf-8")


def is_scratch(path: Path) -> bool:
    """Tell whether this is a scratch folder, which only a killed process leaves behind."""
    return path.name.startswith(_SCRATCH) and path.is_dir()


def clear_scratch(folder: Path) -> None:
    """Take away what killed processes left of scratch folders."""
    for left in filter(is_scratch, folder.iterdir()):
        shutil.rmtree(left)


def sha256(path: Path) -> str:
    """Give the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Hashing more than a GiB would take longer than the comparison it is for.
_MOST_HASHED = 1 << 30


def describe(places: Iterable[Place]) -> list[dict[str, object]]:
    """Tell name and size of each file, and its SHA-256 where all of them are at most a GiB.

    Of a file elsewhere it tells what its store says it is: its hash could be had only by fetching
    all of it.
    """
    files = list(places)
    hashed = sum(place.stat().st_size for place in files) <= _MOST_HASHED
    return [_describe(place, hashed) for place in files]


def _describe(place: Place, hashed: bool) -> dict[str, object]:
    known: dict[str, object] = {"file": place.name, "bytes": place.stat().st_size}
    if isinstance(place, RemotePlace):
        return known | {"mark": place.mark}
    return known | {"sha256": sha256(Path(str(place))) if hashed else None}


def _first_missing(folder: Path) -> Path | None:
    """Give the topmost folder of a path that does not exist yet."""
    missing = [f for f in (folder, *folder.parents) if not os.path.lexists(f)]
    return missing[-1] if missing else None
