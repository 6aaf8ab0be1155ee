"""Where bytes live: paths, packages, and a Hub on the loopback interface."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from conftest import save_pico_adapter
from servers import Hub

import wda
from wda.errors import LocationError
from wda.locations import beside, locate, of_model_reference, resolve


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
    for find in (resolve, locate):
        with pytest.raises(LocationError, match=r"ftp:// is not a kind of location that can be"):
            find("ftp://server/model")


def test_what_is_needed_whole_must_be_here() -> None:
    with pytest.raises(LocationError, match=r"s3://b/model: is needed whole on this machine; down"):
        resolve("s3://b/model")


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


def test_a_hub_repository_is_fetched_once(hub: type[Hub]) -> None:
    for _ in range(2):
        folder = resolve("hf://org/pico@v1")
        weights = (folder / "model.safetensors").read_bytes()
        assert weights == (hub.folder / "model.safetensors").read_bytes()
    asked = [name for name, _ in hub.asked]
    assert sorted(asked) == ["config.json", "model.safetensors"]  # and no script


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
    for find in (resolve, locate):
        with pytest.raises(LocationError, match=r"hf://org/pico: the Hub cannot be reached and"):
            find("hf://org/pico")
