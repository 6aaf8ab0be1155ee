"""Where an artefact came from: command, versions, commit, machine, inputs."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from wda._version import __version__
from wda.places import shown

_LIBRARIES = ("torch", "numpy", "pandas", "scipy", "safetensors", "transformers", "peft")


def provenance(**facts: object) -> dict[str, object]:
    """Describe this process, and put the facts of the work beside it.

    Parameters
    ----------
    **facts
        What was used and chosen: locations, hashes, options, seeds.

    Returns
    -------
    dict
        Ready for JSON.
    """
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *map(shown, sys.argv[1:])]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "wda": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
        **facts,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree this package runs from, with a mark when it was changed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
