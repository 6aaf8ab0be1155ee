"""Where bytes live: paths, packages, and a Hub on the loopback interface."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import pico_weights, save_model, save_pico_adapter

import wda
from wda.errors import LocationError
from wda.locations import beside, of_model_reference, resolve


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model"
    with pytest.raises(
        LocationError, match=r"nowhere: no such file or folder; give a path, pkg://"
    ):
        resolve(tmp_path / "nowhere")
    with pytest.raises(LocationError, match=r"for a Hub repository write hf://facebook/bart-base"):
        resolve("facebook/bart-base")


def test_packages_are_found_without_importing_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "a_model_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert resolve("pkg://a_model_package/model") == package / "model"
    assert "a_model_package" not in sys.modules
    with pytest.raises(
        LocationError, match="the installed package 'a_model_package' has no 'data'"
    ):
        resolve("pkg://a_model_package/data")
    with pytest.raises(LocationError, match="no Python package 'not_there' is installed; try: pip"):
        resolve("pkg://not_there/model")


def test_other_schemes_are_refused() -> None:
    with pytest.raises(LocationError, match=r"s3:// is not a kind of location that can be read"):
        resolve("s3://bucket/model")


def test_what_an_adapter_says_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert of_model_reference("org/name") == "hf://org/name"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert of_model_reference("org/name") == "org/name"
    assert of_model_reference("pkg://a/b") == "pkg://a/b"
    assert of_model_reference("/models/llama") == "/models/llama"


def test_relative_paths_start_from_the_file_they_stand_in() -> None:
    manifest = Path("experiments/manifest.yaml")
    assert beside(manifest, "runs/ft") == "experiments/runs/ft"
    assert beside(manifest, "/runs/ft") == "/runs/ft"
    assert beside(manifest, "hf://a/b") == "hf://a/b"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as serving one public repository takes."""

    folder: Path
    commit = "0123456789abcdef0123456789abcdef01234567"
    served: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if re.fullmatch(r"/api/models/org/pico/revision/(main|v1)", path):
            siblings = [{"rfilename": f.name} for f in self.folder.iterdir()]
            info = {"id": "org/pico", "sha": self.commit, "siblings": siblings, "private": False}
            info |= {"tags": [], "downloads": 0, "likes": 0, "lastModified": None}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
        elif path == f"/api/models/org/pico/tree/{self.commit}":
            tree = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                for f in self.folder.iterdir()
            ]
            self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        elif match := re.fullmatch(rf"/org/pico/resolve/(?:main|v1|{self.commit})/([\w.-]+)", path):
            content = (self.folder / match.group(1)).read_bytes()
            if body:
                self.served.append(match.group(1))
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            self._send(200, content, headers | {"X-Repo-Commit": self.commit}, body)
        else:
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self._send(404, b"", headers, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    folder = save_model(tmp_path / "repository", pico_weights())
    (folder / "training_script.py").write_text("print()")
    handler = type("OneHub", (Hub,), {"folder": folder, "served": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield handler
    server.shutdown()


def test_a_hub_repository_is_fetched_once(hub: type[Hub], tmp_path: Path) -> None:
    save_pico_adapter(tmp_path / "a")
    expected = wda.compare(tmp_path / "a", base=hub.folder, progress=False).table
    for _ in range(2):
        table = wda.compare(tmp_path / "a", base="hf://org/pico@v1", progress=False).table
        assert table.equals(expected)
    assert sorted(hub.served) == ["config.json", "model.safetensors"]  # and no script


def test_the_base_an_adapter_names_is_looked_up_on_the_hub(hub: type[Hub], tmp_path: Path) -> None:
    save_pico_adapter(tmp_path / "a", base_model_name_or_path="org/pico")
    comparison = wda.compare(tmp_path / "a", progress=False)
    assert comparison.provenance["base"]["location"] == "hf://org/pico"  # type: ignore[index]


def test_a_hub_repository_that_is_not_there(hub: type[Hub]) -> None:
    with pytest.raises(LocationError, match=r"hf://org/other: .*; check the name and revision"):
        resolve("hf://org/other")
    with pytest.raises(LocationError, match="expected hf://ORG/NAME or hf://ORG/NAME@REVISION"):
        resolve("hf://pico")


def test_no_hub_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LocationError, match=r"hf://org/pico: the Hub cannot be reached and"):
        resolve("hf://org/pico")
