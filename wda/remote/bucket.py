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
_NO_CREDENTIALS = (
    *("CredentialsError", "TokenError", "RetrievalError", "ProfileNotFound"),
    "RefreshError",  # of a login at Google that is over
)


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
        """Give the ETag, or the generation where there are generations."""
        self.size(key)
        return self._marks.get(key)

    def piece(self, key: str, start: int, into: memoryview) -> int:
        """Read a range of the file that was listed, and refuse another under its name."""
        read = self._read_generation if self._scheme == "gs" else self._read_unchanged
        try:
            came = read(key, start, start + len(into))
        except LocationError:
            raise
        except Exception as error:
            raise self._explained(error, key) from None
        if len(came) > len(into):
            raise LocationError(
                f"{self.url(key)}: this server sends whole files only (no range requests); "
                "download it and give its path"
            )
        into[: len(came)] = came
        return len(came)

    def _read_generation(self, key: str, start: int, stop: int) -> bytes:
        # A name that gcsfs would not take apart as it is meant has no generation put behind it.
        pinned = self.mark(key) and set(key).isdisjoint("#?:")
        name = f"{key}#{self.mark(key)}" if pinned else key
        return bytes(self._system.cat_file(name, start=start, end=stop))

    def _read_unchanged(self, key: str, start: int, stop: int) -> bytes:
        with self._system.open(key, "rb", cache_type="none") as file:
            # s3fs asks for the ETag that it knows; in another process it has asked for that anew.
            if file.info().get("ETag") != self.mark(key):
                raise self._changed(key)
            file.seek(start)
            return bytes(file.read(stop - start))

    def _changed(self, key: str) -> LocationError:
        return LocationError(f"{self.url(key)}: changed while it was read; compare again")

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
                self._marks[path] = item.get("ETag") or item.get("generation")
        return found

    def _explained(self, error: Exception, key: str) -> Exception:
        """Give the error to raise: one that asking again may mend, or one the user has to."""
        kind = type(error).__name__
        if kind == "FileExpired":
            return self._changed(key)
        if kind == "ParamValidationError":
            return LocationError(f"{self.url(key)}: no bucket can be called so; check its name")
        if _is_refusal(error):
            return LocationError(
                f"{self.url(key)}: no credentials, or none that may read it; {_LOGIN[self._scheme]}"
            )
        if isinstance(error, FileNotFoundError):
            return LocationError(
                f"{self.url(key)}: was deleted or written anew while it was read; compare again"
            )
        return TemporaryError(f"{kind}: {error}")


def _is_refusal(error: Exception) -> bool:
    """Tell whether a store wants other credentials; gcsfs has no kind of error for that."""
    return (
        isinstance(error, PermissionError)
        or type(error).__name__.endswith(_NO_CREDENTIALS)
        or str(error).startswith("Forbidden")
        or getattr(error, "code", None) == 401
    )


def open_bucket(scheme: str, rest: str) -> Bucket:
    """Give the store of a bucket.

    Raises
    ------
    MissingExtraError
        When the package for this kind of store is not installed.
    """
    if not rest.strip("/"):
        raise LocationError(f"{scheme}://: no bucket in it; expected {scheme}://BUCKET/PATH")
    seconds = PATIENCE.timeout
    options: dict[str, dict[str, Any]] = {
        "s3": {"config_kwargs": {"connect_timeout": seconds, "read_timeout": seconds}},
        "gs": {"version_aware": True},  # so that a generation can be asked for
    }
    try:
        system = fsspec.filesystem(scheme, skip_instance_cache=True, **options[scheme])
    except ImportError:
        package = {"s3": "s3fs", "gs": "gcsfs"}[scheme]
        raise MissingExtraError(
            f"{scheme}://{rest}: reading it needs {package}; "
            "try: pip install 'weight-decomposition-analysis[remote]'"
        ) from None
    return Bucket(scheme, system)
