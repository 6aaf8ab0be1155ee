"""A place where bytes lie: what a :class:`pathlib.Path` and a remote file or folder have in common.

Readers of checkpoints ask no more of a place than this, so a path is one as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Protocol

# Scheme, credentials, server and path, query and fragment; not where "@" and "?" may be of a name.
_ADDRESS = re.compile(
    r"\b(?!(?:hf|s3|gs|pkg):)([a-z][a-z0-9+.-]+:/+)([^/?#]*@)?([^?#]*)([?#].*)?",
    re.IGNORECASE | re.DOTALL,
)


def shown(location: object) -> str:
    """Give a location, or a word of a command, without what may be a secret in it.

    Examples
    --------
    >>> shown("--base=https://me:password@server/model?signature=secret")
    '--base=https://server/model'
    >>> shown("hf://org/name@main")
    'hf://org/name@main'
    """
    return _ADDRESS.sub(r"\1\3", str(location))


class Place(Protocol):
    """A file or folder, here or elsewhere; ``str()`` of it is what the user would write."""

    @property
    def name(self) -> str:
        """Last part of its path."""

    @property
    def suffix(self) -> str:
        """Ending of its name, with the dot."""

    @property
    def parent(self) -> Place:
        """The folder it lies in."""

    def __truediv__(self, name: str, /) -> Place:
        """Give a file or folder in it."""

    def is_file(self) -> bool:
        """Tell whether it is a file that exists."""

    def is_dir(self) -> bool:
        """Tell whether it is a folder."""

    def iterdir(self) -> Iterable[Place]:
        """Give what lies in the folder, as far as that can be listed."""

    def stat(self) -> os.stat_result:
        """Give, at least, the size."""

    def read_text(self, encoding: str | None = None) -> str:
        """Give the whole file as text."""
