"""Buckets of S3 and of Google Cloud Storage, through fsspec."""

from __future__ import annotations

from typing import Any

import fsspec

from wda.errors import LocationError, MissingExtraError
from wda.remote.fetch import PATIENCE, TemporaryError, persist
from wda.remote.place import Store

_LOGIN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run: aws configure; "
    "for a public bucket set FSSPEC_S3_ANON=true",
    "gs": "run: gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS; "
    "for a public bucket set FSSPEC_GS_TOKEN=anon",
}
_NO_CREDENTIALS = ("CredentialsError", "TokenError", "RetrievalError", "ProfileNotFound")


class Bucket(Store):
    """One bucket; a key is ``BUCKET/PATH``."""

    def __init__(self, scheme: str, system: Any) -> None:
        self._scheme, self._system = scheme, system
        self._listed: dict[str, dict[str, int | None]] = {}
        self._marks: dict[str, str | None] = {}

    def url(self, key: str) -> str:
        """Give the location."""
        return f"{self._scheme}://{key}"

    def children(self, key: str) -> dict[str, int | None]:
        """Give what lies in a folder, asking for it once."""
        if key not in self._listed:
            self._listed[key] = persist(lambda: self._list(key), self.url(key))
        return self._listed[key]

    def size(self, key: str) -> int | None:
        """Give a file's size, from the listing of its folder."""
        folder, _, name = key.rpartition("/")
        return self.children(folder).get(name) if folder else None

    def mark(self, key: str) -> str | None:
        """Give the ETag."""
        self.size(key)
        return self._marks.get(key)

    def piece(self, key: str, start: int, into: memoryview) -> int:
        """Read a range of a file."""
        try:
            came = self._system.cat_file(key, start=start, end=start + len(into))
        except Exception as error:
            raise self._explained(error, key) from None
        if len(came) > len(into):
            raise LocationError(
                f"{self.url(key)}: this server sends whole files only (no range requests); "
                "download it and give its path"
            )
        into[: len(came)] = came
        return len(came)

    def _list(self, key: str) -> dict[str, int | None]:
        try:
            listed = self._system.ls(key, detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:
            raise self._explained(error, key) from None
        found: dict[str, int | None] = {}
        for item in listed:
            path, is_file = item["name"].rstrip("/"), item["type"] == "file"
            # A store lists a file under its own name, and some an empty file that marks a folder.
            if path != key:
                found[path.rpartition("/")[2]] = int(item["size"]) if is_file else None
                self._marks[path] = item.get("ETag") or item.get("etag")
        return found

    def _explained(self, error: Exception, key: str) -> Exception:
        """Give the error to raise: one that asking again may mend, or one the user has to."""
        kind = type(error).__name__
        if isinstance(error, PermissionError) or kind.endswith(_NO_CREDENTIALS):
            return LocationError(
                f"{self.url(key)}: no credentials, or none that may read it; {_LOGIN[self._scheme]}"
            )
        if isinstance(error, FileNotFoundError):
            return LocationError(f"{self.url(key)}: it is not there any more; compare again")
        return TemporaryError(f"{kind}: {error}")


def open_bucket(scheme: str, rest: str) -> Bucket:
    """Give the store of a bucket.

    Raises
    ------
    MissingExtraError
        When the package for this kind of store is not installed.
    """
    if not rest.strip("/"):
        raise LocationError(f"{scheme}://: no bucket in it; expected {scheme}://BUCKET/PATH")
    options: dict[str, Any] = {}
    if scheme == "s3":
        seconds = PATIENCE.timeout
        options["config_kwargs"] = {"connect_timeout": seconds, "read_timeout": seconds}
    try:
        return Bucket(scheme, fsspec.filesystem(scheme, skip_instance_cache=True, **options))
    except ImportError:
        package = {"s3": "s3fs", "gs": "gcsfs"}[scheme]
        raise MissingExtraError(
            f"{scheme}://{rest}: reading it needs {package}; "
            "try: pip install 'weight-decomposition-analysis[remote]'"
        ) from None
