"""Where bytes live: a path, ``pkg://…``, ``hf://org/name@revision``, ``https://``, ``s3://``, ``gs://``.

Every field and option that names a model or a checkpoint takes a location. :func:`locate` gives the
place it names, here or elsewhere, to be read in parts; :func:`resolve` brings it to a path on this
machine, for those who need all of it.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from wda.errors import LocationError
from wda.places import Place, shown
from wda.remote import SCHEMES, open_remote

_SCHEME = re.compile(r"^([a-z0-9+]+)://(.*)$", re.IGNORECASE)
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")

# What of a model repository is needed to read its weights and to train it.
_HUB_FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.csv")

KINDS = (
    "a path, pkg://PACKAGE/PATH, hf://ORG/NAME@REVISION, https://SERVER/PATH, s3://BUCKET/PATH "
    "or gs://BUCKET/PATH"
)


def locate(location: str | Path) -> Place:
    """Find a location, here or elsewhere, without fetching it.

    Parameters
    ----------
    location : str or Path
        A path, ``pkg://package/path``, ``hf://org/name@revision``, ``https://server/path``,
        ``s3://bucket/path`` or ``gs://bucket/path``.

    Returns
    -------
    Place
        A path where it is on this machine; else a remote place, of which only what is asked for
        is read. A web server cannot tell whether a folder exists, so there it may not.

    Raises
    ------
    LocationError
        When the location is of another kind, does not exist or may not be read.
    MissingExtraError
        When its kind needs a package that is not installed.
    """
    match = _SCHEME.match(str(location))
    if match is None or match.group(1).lower() not in SCHEMES:
        return resolve(location)
    return open_remote(str(location)) or _on_hub(match.group(2), cached=True)


def resolve(location: str | Path) -> Path:
    """Bring a location to this machine, fetching it from the Hub where it lies there.

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
    if scheme in SCHEMES:
        raise LocationError(
            f"{shown(location)}: is needed whole on this machine; download it and give its path"
        )
    raise LocationError(
        f"{shown(location)}: {scheme}:// is not a kind of location that can be read; give {KINDS}"
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
    raise LocationError(f"{shown(path)}: no such file or folder; give {KINDS}{hint}")


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


def _on_hub(rest: str, cached: bool = False) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    name, _, revision = rest.partition("@")
    if not _HUB_ID.match(name):
        raise LocationError(f"hf://{rest}: expected hf://ORG/NAME or hf://ORG/NAME@REVISION")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=list(_HUB_FILES),
                local_files_only=cached,
            )
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
