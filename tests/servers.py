"""Servers on the loopback interface: files in ranges, with faults on purpose; a Hub; S3.

And what stands for gcsfs, of which there is no server here.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

STALL = 5.0


class Files(BaseHTTPRequestHandler):
    """A web server for a folder, which counts the bytes it sends.

    ``faults`` names, per file, what happens to its next requests for more than a header's length.
    """

    folder: Path
    served: Counter[str]
    asked: list[tuple[str, str]]
    authorized: list[str | None]
    faults: dict[str, list[str]]
    ranges = True
    lock = threading.Lock()

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.send_file(self.path.partition("?")[0].lstrip("/"), {}, body)

    def send_file(self, name: str, headers: dict[str, str], body: bool) -> None:
        """Send a file or the range asked for, or as much as the fault in turn lets through."""
        file = self.folder / name
        if not file.is_file():
            self.send(404, b"", {}, body)
            return
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', **headers}
        wanted = self.headers.get("Range")
        if body:
            self.asked.append((name, wanted or ""))
            self.authorized.append(self.headers.get("Authorization"))
        if not (wanted and self.ranges):
            self.send(200, content, headers, body, name)
            return
        start, stop = (int(n) for n in re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())  # type: ignore[union-attr]
        part = content[start : stop + 1]
        with self.lock:
            faults = self.faults.get(name, []) if len(part) > 8 else []
            fault = faults.pop(0) if faults else ""
        if fault == "short":
            part = part[: len(part) // 2]
        last = start + len(part) - 1
        headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
        if fault in ("503", "500"):
            self.send(int(fault), b"", {}, body)
        elif fault == "429":
            self.send(429, b"", {"Retry-After": "1"}, body)
        elif fault == "stall":
            time.sleep(STALL)
        else:
            self.send(206, part, headers, body, name, fault)

    def send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str],
        body: bool,
        name: str = "",
        fault: str = "",
    ) -> None:
        self.send_response(status)
        for field, value in headers.items():
            self.send_header(field, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not body:
            return
        if fault in ("drop", "truncate"):
            content = content[: len(content) // 2]
        # Counted before it is sent: the client may look at the count as soon as all has come.
        self.count(name, len(content))
        try:
            self.wfile.write(content)
        except OSError:  # the client has hung up
            self.count(name, -len(content))
            return
        if fault == "drop":
            time.sleep(0.05)  # so that what was sent is read before the connection is reset
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()

    def count(self, name: str, size: int) -> None:
        with self.lock:
            if name:
                self.served[name] += size

    def log_message(self, *args: object) -> None:
        pass


class Hub(Files):
    """As much of the Hub as serving one public repository takes."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        names = [str(f.relative_to(self.folder)) for f in self.folder.rglob("*") if f.is_file()]
        sizes = {name: (self.folder / name).stat().st_size for name in sorted(names)}
        kind = {"Content-Type": "application/json"}
        if re.fullmatch(r"/api/models/org/pico(/revision/(main|v1))?", path):
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            info = {"id": "org/pico", "sha": self.commit, "siblings": siblings, "private": False}
            info |= {"tags": [], "downloads": 0, "likes": 0, "lastModified": None}
            self.send(200, json.dumps(info).encode(), kind, body)
        elif path == f"/api/models/org/pico/tree/{self.commit}":
            tree = [
                {"type": "file", "path": name, "size": size, "oid": "0" * 40}
                for name, size in sizes.items()
            ]
            self.send(200, json.dumps(tree).encode(), kind, body)
        elif match := re.fullmatch(rf"/org/pico/resolve/(?:main|v1|{self.commit})/(.+)", path):
            self.send_file(match.group(1), {"X-Repo-Commit": self.commit}, body)
        else:
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self.send(404, b"", headers, body)


@contextmanager
def serving(kind: type[Files], folder: Path) -> Iterator[tuple[type[Any], str]]:
    """Serve a folder; gives the handler, which tells what was served, and the address."""
    facts = {"folder": folder, "served": Counter(), "asked": [], "authorized": [], "faults": {}}
    handler = type(f"One{kind.__name__}", (kind,), facts)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield handler, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Counting:
    """Counts what a WSGI application sends per file of a bucket, and spoils some answers."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.application = application
        self.served: Counter[str] = Counter()
        self.faults: list[str] = []
        self.lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        wanted = environ.get("HTTP_RANGE", "")
        with self.lock:
            fault = self.faults.pop(0) if wanted and self.faults else ""
        if fault == "503":
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        content = b"".join(self.application(environ, start_response))
        if fault == "truncate":
            content = content[: len(content) // 2]
        if environ["REQUEST_METHOD"] == "GET":
            with self.lock:
                self.served[environ["PATH_INFO"].rpartition("/")[2]] += len(content)
        return [content]


@contextmanager
def s3_server() -> Iterator[tuple[Counting, str]]:
    """Run moto's S3 server; gives what counts its answers, and its address."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    counting = Counting(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, counting, threaded=True)  # type: ignore[arg-type]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield counting, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class FakeGoogle(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """As much of gcsfs as reading takes: the folders in a folder are buckets.

    Entries, errors and the meaning of a name with a generation behind it are those of gcsfs.
    """

    protocol = ("gs", "gcs")
    buckets: Path
    served: Counter[str]
    refusal: Exception | None = None

    def __init__(self, version_aware: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.version_aware = version_aware

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """List a folder, or a file under its own name."""
        if self.refusal is not None:
            raise self.refusal
        place = self.buckets / path
        if not place.exists():
            raise FileNotFoundError(f"b/{path}")
        found = [self._entry(p) for p in (sorted(place.iterdir()) if place.is_dir() else [place])]
        return found if detail else [entry["name"] for entry in found]

    def cat_file(self, path: str, start: int, end: int, **_: Any) -> bytes:  # type: ignore[override]
        """Read a range, of one generation where the name ends with it."""
        bucket, _, key = path.partition("/")
        parts, generation = urlsplit(key), ""
        if self.version_aware and parts.fragment.isdigit():
            key, generation = parts.path, parts.fragment
        place = self.buckets / bucket / key
        if not place.is_file() or (generation and generation != self._entry(place)["generation"]):
            raise FileNotFoundError(f"download/b/{path}")
        part = place.read_bytes()[start:end]
        self.served[place.name] += len(part)
        return part

    def _entry(self, place: Path) -> dict[str, Any]:
        entry = {"name": str(place.relative_to(self.buckets)), "size": 0, "type": "directory"}
        if place.is_dir():
            return entry | {"storageClass": "DIRECTORY"}
        content = place.read_bytes()
        generation = str(int(hashlib.sha256(content).hexdigest(), 16) % 10**16)
        tags = {"etag": f"C{generation[:6]}=", "generation": generation, "metageneration": "1"}
        return entry | tags | {"size": len(content), "type": "file"}
