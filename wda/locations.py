"""Where bytes live: a path, ``pkg://package/path``, ``hf://org/name@revision``.

Every field and option that names a model, a checkpoint or a data file takes a location, and
:func:`resolve` turns it into a path on this machine.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from wda.errors import LocationError

_SCHEME = re.compile(r"^([a-z0-9+]+)://(.*)$", re.IGNORECASE)
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")

# What of a model repository is needed to read its weights and to train it.
_HUB_FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.csv")

KINDS = "a path, pkg://PACKAGE/PATH or hf://ORG/NAME@REVISION"


def resolve(location: str | Path) -> Path:
    """Find a location on this machine, fetching it from the Hub where it lies there.

    Parameters
    ----------
    location : str or Path
        A path; ``pkg://package/path``, a file or folder inside an installed Python package (which
        is found without importing it); or ``hf://org/name@revision``, a repository on the Hugging
        Face Hub, kept in its cache.

    Returns
    -------
    Path
        An existing file or folder.

    Raises
    ------
    LocationError
        When the location is of another kind or does not exist.
    """
    match = _SCHEME.match(str(location))
    if match is None:
        return _existing(Path(location).expanduser())
    scheme, rest = match.group(1).lower(), match.group(2)
    if scheme == "pkg":
        return _in_package(rest)
    if scheme == "hf":
        return _on_hub(rest)
    raise LocationError(
        f"{location}: {scheme}:// is not a kind of location that can be read; give {KINDS}"
    )


def is_location(text: str) -> bool:
    """Tell whether a text carries a scheme, so that it is no path."""
    return _SCHEME.match(text) is not None


def beside(file: Path, location: str) -> str:
    """Start a relative path from the folder of the file it was read in; leave others alone."""
    if is_location(location) or Path(location).expanduser().is_absolute():
        return location
    return str(file.parent / location)


def of_model_reference(reference: str) -> str:
    """Turn what an adapter says of its base, a path or a bare Hub id, into a location.

    Examples
    --------
    >>> of_model_reference("facebook/bart-base")
    'hf://facebook/bart-base'
    """
    if is_location(reference) or Path(reference).exists() or not _HUB_ID.match(reference):
        return reference
    return f"hf://{reference}"


def _existing(path: Path) -> Path:
    if path.exists():
        return path
    hint = f"; for a Hub repository write hf://{path}" if _HUB_ID.match(str(path)) else ""
    raise LocationError(f"{path}: no such file or folder; give {KINDS}{hint}")


def _in_package(rest: str) -> Path:
    package, _, inside = rest.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        raise LocationError(
            f"pkg://{rest}: no Python package {package!r} is installed; "
            f"try: pip install {distribution}"
        )
    for folder in spec.submodule_search_locations:
        if (Path(folder) / inside).exists():
            return Path(folder) / inside
    raise LocationError(f"pkg://{rest}: the installed package {package!r} has no {inside!r}")


def _on_hub(rest: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    name, _, revision = rest.partition("@")
    if not _HUB_ID.match(name):
        raise LocationError(f"hf://{rest}: expected hf://ORG/NAME or hf://ORG/NAME@REVISION")
    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(_HUB_FILES))
        )
    except LocalEntryNotFoundError:
        raise LocationError(
            f"hf://{rest}: the Hub cannot be reached and the repository is not in the local cache; "
            "download it elsewhere and give its path"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise LocationError(
            f"hf://{rest}: {why}; check the name and revision, or log in with: hf auth login"
        ) from None
