"""Files on other machines: found by name, read in parts, never fetched whole for a part."""

from __future__ import annotations

from wda.remote.fetch import at_once
from wda.remote.place import RemotePlace, Store, remote_place

__all__ = ["SCHEMES", "RemotePlace", "Store", "at_once", "open_remote"]

SCHEMES = ("hf", "https", "http", "s3", "gs")


def open_remote(location: str) -> RemotePlace | None:
    """Give the file or folder that a location of one of ``SCHEMES`` names.

    None stands for a Hub that does not answer: its cache on this machine may do.

    Raises
    ------
    LocationError
        When it does not exist, where that can be told at once, or may not be read.
    MissingExtraError
        When its kind needs a package that is not installed.
    """
    scheme, _, rest = location.partition("://")
    scheme = scheme.lower()
    if scheme == "hf":
        from wda.remote.hub import UnreachableError, open_repository  # noqa: PLC0415 - slow

        try:
            return remote_place(open_repository(rest), "")
        except UnreachableError:
            return None
    if scheme in ("s3", "gs"):
        from wda.remote.bucket import open_bucket  # noqa: PLC0415 - slow to import

        return remote_place(open_bucket(scheme, rest), rest.strip("/"))
    from wda.remote.http import open_site  # noqa: PLC0415 - only where it is needed

    return remote_place(*open_site(location))
