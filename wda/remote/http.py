"""Files on a web server that serves ranges of them; its folders cannot be listed.

The standard library's client does: what matters here, going on from the byte where an answer broke
off and refusing a server that ignores ranges, the ready-made file systems do not do.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from wda.errors import LocationError
from wda.places import shown
from wda.remote.fetch import PATIENCE, TemporaryError, persist
from wda.remote.place import Store

TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
_ABSENT = (403, 404, 410)  # a bucket behind a web address says 403 of what is not there
_LOGIN = {
    401: "it wants a login; write https://USER:PASSWORD@SERVER/PATH, or download it and give its "
    "path",
    403: "it may not be read; if the address was signed, sign it anew",
}
_FILES = (".safetensors", ".bin", ".json", ".yaml", ".txt")
_CHUNK = 1 << 20
_HEAD = 8  # bytes that tell a file's size, and the length of a safetensors header
_IN_QUERY = "%/?:@!$&'()*+,;="  # what a query may hold beside letters, digits and "_.-~"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirection, taking a token along only to the same server."""

    def redirect_request(self, req: Any, *args: Any) -> urllib.request.Request | None:
        new = super().redirect_request(req, *args)
        token = req.unredirected_hdrs.get("Authorization")
        if new is not None and token and new.host == req.host and new.type == req.type:
            new.add_unredirected_header("Authorization", token)
        return new


_OPENER = urllib.request.build_opener(_Redirects)


def read_range(
    url: str, start: int, into: memoryview, shown: str, headers: Mapping[str, str] | None = None
) -> tuple[int, int, str | None]:
    """Read part of a file into a buffer.

    Parameters
    ----------
    url : str
        Where the file lies.
    start : int
        The first byte wanted.
    into : memoryview
        Where to put as many bytes as fit.
    shown : str
        The file's name for messages; its address may hold a secret.
    headers : mapping, optional
        Sent along; ``Authorization`` goes to no other server.

    Returns
    -------
    came, size : int
        How many bytes came, and the size of the whole file.
    mark : str or None
        What identifies the content: its ETag, else when it was last modified.

    Raises
    ------
    TemporaryError
        When asking again may help.
    LocationError
        When the server does not serve ranges.
    urllib.error.HTTPError
        With the server's answer when it is another one.
    """
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
    request.add_header("Range", f"bytes={start}-{start + len(into) - 1}")
    for name, value in (headers or {}).items():
        request.add_unredirected_header(name.capitalize(), value)
    try:
        with _OPENER.open(request, timeout=PATIENCE.timeout) as response:
            size = _size_of(response, start, shown)
            mark = response.headers.get("ETag") or response.headers.get("Last-Modified")
            return _drain(response, into), size, mark
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in TEMPORARY:
            raise TemporaryError(f"HTTP {error.code} {error.reason}", _retry_after(error)) from None
        raise
    except (OSError, http.client.HTTPException) as error:
        raise TemporaryError(error) from None


def refusal(error: urllib.error.HTTPError, login: Mapping[int, str]) -> str:
    """Say what a server answered instead of a file, and what to do.

    Parameters
    ----------
    error : urllib.error.HTTPError
        Its answer.
    login : mapping
        Status → what to do where the server wants to know who asks.
    """
    gone = dict.fromkeys((404, 410), "it is not there any more; compare again")
    hint = {**gone, **login}.get(error.code, "check the location")
    return f"HTTP {error.code} {error.reason}; {hint}"


def _size_of(response: Any, start: int, shown: str) -> int:
    """Give the whole file's size from an answer, which must be the range that was asked for."""
    if response.status != 206:
        # Leaving the block closes the connection, so that the body is not fetched.
        raise LocationError(
            f"{shown}: this server sends whole files only (no range requests); download it and "
            "give its path, or put it where ranges are served"
        )
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if match is None or int(match.group(1)) != start:
        raise TemporaryError(f"another range came than bytes {start}-")
    return int(match.group(2))


def _drain(response: Any, into: memoryview) -> int:
    """Read until the buffer is full or the answer ends, also where it ends too early."""
    filled = 0
    try:
        # read1 gives what has come; a call that waits for more would lose it if the rest does not.
        while filled < len(into) and (came := response.read1(min(_CHUNK, len(into) - filled))):
            into[filled : filled + len(came)] = came
            filled += len(came)
    except (OSError, http.client.HTTPException):
        if not filled:
            raise
    return filled


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    said = error.headers.get("Retry-After", "")
    if said.strip().isdigit():
        return float(said)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


class Site(Store):
    """A web server; a key is the path of an address.

    Parameters
    ----------
    scheme, host : str
        Where it is.
    query : str
        Goes behind every path; it may be a signature.
    headers : mapping
        Sent along to this server alone; they may hold a login.
    """

    def __init__(self, scheme: str, host: str, query: str, headers: Mapping[str, str]) -> None:
        self._scheme, self._host, self._query, self._headers = scheme, host, query, dict(headers)
        # Key → size, mark and first bytes; None where there is no such file.
        self._known: dict[str, tuple[int, str | None, bytes] | None] = {}

    def url(self, key: str) -> str:
        """Give the address without its query."""
        return f"{self._scheme}://{self._host}/{key}"

    def children(self, key: str) -> None:  # noqa: ARG002
        """Tell that no one can tell."""
        return

    def size(self, key: str) -> int | None:
        """Give a file's size, found by asking for its first bytes."""
        if PurePosixPath(key).suffix not in _FILES:
            return None
        if key not in self._known:
            self._known[key] = persist(lambda: self._probe(key), self.url(key))
        known = self._known[key]
        return None if known is None else known[0]

    def mark(self, key: str) -> str | None:
        """Give the ETag, or when it was last modified."""
        known = self._known.get(key)
        return known and known[1]

    def piece(self, key: str, start: int, into: memoryview) -> int:
        """Read from the server, and refuse a file that is another than before."""
        known = self._known.get(key)
        if known is not None and start == 0 and len(into) <= len(known[2]):
            into[:] = known[2][: len(into)]
            return len(into)
        try:
            came, size, mark = self._range(key, start, into)
        except urllib.error.HTTPError as error:
            raise LocationError(f"{self.url(key)}: {refusal(error, _LOGIN)}") from None
        if known is not None and known[:2] != (size, mark):
            raise LocationError(f"{self.url(key)}: changed while it was read; compare again")
        return came

    def _probe(self, key: str) -> tuple[int, str | None, bytes] | None:
        head = bytearray(_HEAD)
        try:
            came, size, mark = self._range(key, 0, memoryview(head))
        except urllib.error.HTTPError as error:
            if error.code in _ABSENT:
                return None
            if error.code == 416:  # no byte is there to be had
                return 0, None, b""
            raise LocationError(f"{self.url(key)}: {refusal(error, _LOGIN)}") from None
        if came < min(size, _HEAD):
            raise TemporaryError("the answer ended too early")
        return size, mark, bytes(head[:came])

    def _range(self, key: str, start: int, into: memoryview) -> tuple[int, int, str | None]:
        address = urlunsplit((self._scheme, self._host, quote(f"/{key}"), self._query, ""))
        return read_range(address, start, into, self.url(key), self._headers)


def open_site(location: str) -> tuple[Site, str]:
    """Split an address into its server and the path there."""
    try:
        parts = urlsplit(location)
        _ = parts.port  # is looked at only when it is asked for
    except ValueError as error:
        raise LocationError(
            f"{shown(location)}: is no address ({error}); expected https://SERVER/PATH"
        ) from None
    login, _, host = parts.netloc.rpartition("@")
    if not host:
        raise LocationError(f"{shown(location)}: no server in it; expected https://SERVER/PATH")
    headers = {}
    if login:
        encoded = base64.b64encode(unquote(login).encode()).decode()
        headers["Authorization"] = f"Basic {encoded}"
    query = quote(parts.query, safe=_IN_QUERY)
    return Site(parts.scheme, host, query, headers), unquote(parts.path).strip("/")
