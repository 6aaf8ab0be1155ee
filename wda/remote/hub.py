"""Repositories on the Hugging Face Hub, held at one commit, read in parts."""

from __future__ import annotations

import re
import urllib.error
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub as hf
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from wda.errors import LocationError
from wda.remote.fetch import TemporaryError, persist
from wda.remote.http import TEMPORARY, read_range, refusal
from wda.remote.place import Store

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_LOGIN = dict.fromkeys(
    (401, 403),
    "log in with: hf auth login, and accept the repository's conditions on its page",
)


class UnreachableError(Exception):
    """The Hub does not answer, or may not be asked."""


class Repository(Store):
    """A model repository at one commit, so that all that is read belongs together."""

    def __init__(self, name: str, shown: str, commit: str, files: Mapping[str, int]) -> None:
        self._name, self._shown, self._commit = name, shown, commit
        self._files = dict(files)

    def url(self, key: str) -> str:
        """Give the location, with the revision that was asked for."""
        return f"hf://{self._shown}/{key}".rstrip("/")

    def children(self, key: str) -> dict[str, int | None]:
        """Give what lies in a folder of the repository."""
        prefix, found = f"{key}/" if key else "", dict[str, int | None]()
        for path, size in self._files.items():
            if path.startswith(prefix):
                name, slash, _ = path.removeprefix(prefix).partition("/")
                found[name] = None if slash else size
        return found

    def size(self, key: str) -> int | None:
        """Give a file's size as the Hub lists it."""
        return self._files.get(key)

    def mark(self, key: str) -> str | None:  # noqa: ARG002
        """Give the commit."""
        return self._commit

    def local(self, key: str) -> Path | None:
        """Give the file from the Hub's cache, if it was downloaded at this commit."""
        found = hf.try_to_load_from_cache(self._name, key, revision=self._commit)
        return Path(found) if isinstance(found, str) else None

    def piece(self, key: str, start: int, into: memoryview) -> int:
        """Read from where the Hub keeps the file, with the user's token if there is one."""
        url = hf.hf_hub_url(self._name, key, revision=self._commit)
        try:
            return read_range(url, start, into, self.url(key), build_hf_headers())[0]
        except urllib.error.HTTPError as error:
            raise LocationError(f"{self.url(key)}: {refusal(error, _LOGIN)}") from None


def open_repository(rest: str) -> Repository:
    """Look a repository up: ``ORG/NAME`` or ``ORG/NAME@REVISION``.

    Raises
    ------
    LocationError
        When there is none, or it may not be read.
    UnreachableError
        When the Hub does not answer, so that only its cache can help.
    """
    name, _, revision = rest.rstrip("/").partition("@")
    if not _HUB_ID.match(name):
        raise LocationError(f"hf://{rest}: expected hf://ORG/NAME or hf://ORG/NAME@REVISION")
    info = persist(lambda: _look_up(name, revision or None, rest), f"hf://{rest}")
    files = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    return Repository(name, rest.rstrip("/"), str(info.sha), files)


def _look_up(name: str, revision: str | None, shown: str) -> hf.ModelInfo:
    try:
        return hf.HfApi().model_info(name, revision=revision, files_metadata=True)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in TEMPORARY:
            raise TemporaryError(error) from None
        why = str(error).strip().splitlines()[0]
        raise LocationError(
            f"hf://{shown}: {why}; check the name and revision, or log in with: hf auth login"
        ) from None
    except Exception as error:
        if isinstance(error, ValueError):
            raise LocationError(f"hf://{shown}: {error}; check the name and revision") from None
        raise UnreachableError(shown) from error
