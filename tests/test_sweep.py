"""Grids and what becomes of them: names, errors, one table, shared and failed runs, a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import wda_command
from scipy import stats
from test_training import recipe

import wda
from wda import figures
from wda.errors import ManifestError, TableError
from wda.statistics import mean_of_repetitions
from wda.sweeps import Planned, load_runs, load_sweep, plan_sweep, run_sweep
from wda.sweeps.figures import best_settings
from wda.sweeps.running import Done
from wda.sweeps.sweep import _manifests
from wda.sweeps.table import COLUMNS, SWEEP_FILE
from wda.training import Recipe, TrainingResult

BOTH = [{"method": "lora", "rank": 2}, {"method": "dora", "rank": 3}]


def grid_file(path: Path, trainable: Path, grid: Any, **changes: Any) -> Path:
    changes = {"steps": 4, "keep": [2], **changes}
    shared = recipe(trainable, "ft", **changes).model_dump(exclude_unset=True)
    path.write_text(yaml.safe_dump({**shared, "grid": grid}))
    return path


def sweep_of(tmp_path: Path, trainable: Path, grid: Any, **changes: Any) -> Any:
    return load_sweep(grid_file(tmp_path / "sweep.yaml", trainable, grid, **changes))


def test_every_combination_is_a_run_the_last_key_changing_fastest(
    trainable: Path, tmp_path: Path
) -> None:
    grid = {"adapter": BOTH, "learning_rate": [1e-3, 2e-3], "seed": [0, 5]}
    sweep = sweep_of(tmp_path, trainable, grid)
    told = [(r.recipe.method, r.recipe.rate, r.recipe.seed) for r in sweep.runs]
    assert told == [(m, r, s) for m in ("lora", "dora") for r in (1e-3, 2e-3) for s in (0, 5)]
    assert [r.name for r in sweep.runs[:2]] == [
        "lora_learning_rate-0.001_seed-0",
        "lora_learning_rate-0.001_seed-5",
    ]
    assert sweep.varied["rank"] == (2,) * 4 + (3,) * 4
    assert sweep.matrices == ("query", "value")


def test_grids_in_a_list_add_up_and_no_recipe_comes_twice(trainable: Path, tmp_path: Path) -> None:
    adapter = {"method": "dora", "rank": 2, "alpha": 4, "targets": ["key"]}
    grid = [
        {"adapter": [None], "learning_rate": [1e-3]},
        {"adapter.rank": [2, 4], "learning_rate": [1e-3]},
        {"adapter": [{"rank": 4}, {"magnitudes": ["value"]}]},
    ]
    sweep = sweep_of(tmp_path, trainable, grid, adapter=adapter, learning_rate=1e-3)
    assert [run.name for run in sweep.runs] == [
        "ft",
        "dora_rank-2_magnitudes-none",
        "dora_rank-4",
        "dora_rank-2_magnitudes-value",
    ]
    of_last = sweep.runs[-1].recipe.adapter
    assert (of_last.method, of_last.alpha, of_last.magnitudes) == ("dora", 4, ["value"])
    assert sweep.matrices == ("key", "value")
    assert sweep.varied["rank"] == (None, 2, 4, 2)


def test_all_that_is_wrong_comes_in_one_line(trainable: Path, tmp_path: Path) -> None:
    def refuse(grid: Any, match: str, **changes: Any) -> None:
        with pytest.raises(ManifestError, match=match):
            sweep_of(tmp_path, trainable, grid, **changes)

    refuse({"adapter.rnk": [1]}, r"grid\.adapter\.rnk: no such field; did you mean adapter\.rank\?")
    refuse({"zzz": [1]}, r"grid\.zzz: no such field, see docs/reference\.md")
    refuse({"seed": 3}, "grid")
    refuse({}, "grid")
    refuse({"seed": []}, "grid")
    refuse(
        {
            "adapter": [{"method": "lora", "rank": 0}, {"method": "vera", "alpha": 3}],
            "seed": [0, 1],
        },
        r"2 wrong: .*adapter\.rank: .* greater than or equal to 1.*\(with adapter=.* and 1 other "
        r"combinations\).*alpha: cannot be set for vera",
    )
    path = grid_file(tmp_path / "later.yaml", trainable, {"seed": [0, 1]})
    path.write_text(path.read_text() + "version: 2\nnonesuch: 1\n")
    later = r"2 wrong: .*reads recipes up to version 1.*nonesuch"
    with pytest.raises(ManifestError, match=later) as raised:
        load_sweep(path)
    assert " (with" not in str(raised.value)


def test_a_recipe_with_a_grid_is_for_sweep_alone(trainable: Path, tmp_path: Path) -> None:
    path = grid_file(tmp_path / "sweep.yaml", trainable, {"seed": [0, 1]})
    done = wda_command("train", path, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("has a grid, so it is several recipes; use wda sweep\n")
    assert len(load_runs(path)) == 2
    plain = tmp_path / "plain.yaml"
    plain.write_text(recipe(trainable).to_yaml())
    (run,) = load_runs(plain)
    assert (run.name, run.recipe) == ("plain", recipe(trainable))


def test_what_no_run_can_do_is_told_before_any(trainable: Path, tmp_path: Path) -> None:
    grid = {"adapter": [{"method": "lora", "rank": 999}, *BOTH], "seed": [0, 1, 2]}
    sweep = sweep_of(tmp_path, trainable, grid)
    with pytest.raises(ManifestError, match=r"grid: 1 wrong: lora_rank-999_seed-0: rank: 999 is"):
        plan_sweep(sweep, tmp_path / "runs", progress=False)


def test_matrices_that_are_not_there_are_told_before_any_run(
    trainable: Path, tmp_path: Path
) -> None:
    path = grid_file(tmp_path / "sweep.yaml", trainable, {"seed": [0, 1]})
    path.write_text(path.read_text() + "matrices: [qery]\n")
    with pytest.raises(ManifestError, match="grid: 1 wrong: .*/base: .*no matrix .* 'qery'"):
        plan_sweep(load_sweep(path), tmp_path / "runs", progress=False)


def test_a_large_grid_has_to_be_confirmed(trainable: Path, tmp_path: Path) -> None:
    grid = {"seed": list(range(30))}
    path = grid_file(tmp_path / "many.yaml", trainable, grid)
    done = wda_command("sweep", path, cwd=tmp_path)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first.startswith("30 runs; ")
    assert second.startswith("wda: grid: 30 runs of ")
    assert "more than 24 runs or 2 hours; confirm with --yes" in second
    assert not (tmp_path / "sweeps").exists()
    long = sweep_of(tmp_path, trainable, {"seed": [0]}, steps=10**9)
    with pytest.raises(ManifestError, match="confirm with --yes"):
        plan_sweep(long, tmp_path / "runs", progress=False).require_few()


@pytest.fixture(scope="module")
def swept(trainable: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A sweep of two methods and two seeds, by the command; and what it printed."""
    folder = tmp_path_factory.mktemp("swept")
    grid_file(folder / "two.yaml", trainable, {"adapter": BOTH, "seed": [0, 1]})
    return folder, wda_command("sweep", "two.yaml", "--out", "out", cwd=folder)


def test_a_sweep_writes_one_table_and_its_figures(swept: tuple[Path, Any]) -> None:
    folder, done = swept
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(folder / "out" / SWEEP_FILE)
    assert list(table.columns) == [*list(COLUMNS)[:3], "rank", *list(COLUMNS)[3:]]
    assert list(table["run"]) == ["lora_seed-0", "lora_seed-1", "dora_seed-0", "dora_seed-1"]
    compared = pd.read_parquet(folder / "out/table.parquet")
    for row in table.to_dict("records"):
        result = json.loads((folder / row["folder"] / "result.json").read_text())
        for name in ("accuracy", "loss", "seconds", "peak_memory", "trainable"):
            assert row[name] == pytest.approx(result[name], rel=1e-12)
        assert row["trainable_share"] == result["trainable"] / result["parameters"]
        alone = wda.compare(folder / row["folder"], progress=False)
        last = alone.table[alone.table["step"] == 4]
        assert row["delta_m"] == pytest.approx(last["delta_m"].mean(), rel=1e-12)
        assert row["delta_d"] == pytest.approx(last["delta_d"].mean(), rel=1e-12)
        r = np.corrcoef(alone.table["delta_d"], alone.table["delta_m"])[0, 1]
        assert row["pearson_r"] == pytest.approx(r, rel=1e-9)
        assert len(compared[compared["run"] == row["run"]]) == len(alone.table)
    assert table["error"].isna().all()
    written = {file.name for file in (folder / "out").iterdir()}
    assert written == {
        *("runs", SWEEP_FILE, "table.csv", "table.parquet", "statistics.csv"),
        *(f"{n}.{e}" for n in ("accuracy_by_method", "profile") for e in ("png", "pdf")),
    }
    for name in table["run"]:
        assert name in done.stdout


def test_what_is_finished_is_not_trained_again_nor_in_another_sweep(
    swept: tuple[Path, Any], trainable: Path
) -> None:
    folder, _ = swept
    before = {p: p.stat().st_mtime_ns for p in (folder / "out/runs").rglob("*") if p.is_file()}
    again = wda_command("sweep", "two.yaml", "--out", "out", cwd=folder)
    assert (again.returncode, "4 runs, 4 of them finished\n" in again.stderr) == (0, True)
    # Another sweep, which calls the common run otherwise, and the new one by a name that is taken.
    grid = [{"adapter": [BOTH[0]], "seed": [0]}, {"adapter": [{"method": "lora", "rank": 5}]}]
    grid_file(folder / "other.yaml", trainable, grid)
    command = ("sweep", "other.yaml", "--out", "other", "--runs", "out/runs")
    other = wda_command(*command, cwd=folder)
    assert other.returncode == 0, other.stderr
    table = pd.read_csv(folder / "other" / SWEEP_FILE)
    assert list(table["run"]) == ["lora_rank-2", "lora_rank-5"]
    assert list(table["folder"]) == ["out/runs/lora_seed-0", "out/runs/lora_rank-5"]
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())


def test_a_run_that_fails_is_reported_and_the_rest_goes_on(trainable: Path, tmp_path: Path) -> None:
    grid = {"learning_rate": [1e30, 1e-3], "adapter": [BOTH[0]]}
    path = grid_file(tmp_path / "sweep.yaml", trainable, grid)
    done = wda_command("sweep", path, "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "1 of 2 runs failed; the same command tries them again" in done.stderr
    assert "the loss is no number any more" in done.stdout
    bad, good = pd.read_csv(tmp_path / "out" / SWEEP_FILE).to_dict("records")
    assert np.isnan(bad["accuracy"])
    assert "the loss is no number any more" in bad["error"]
    assert good["accuracy"] > 0


def test_a_sweep_of_adapters_beside_weights_has_no_delta(trainable: Path, tmp_path: Path) -> None:
    grid = {"adapter": [{"method": "series", "bottleneck": 2, "targets": ["down"]}]}
    sweep = sweep_of(tmp_path, trainable, grid)
    outcome = run_sweep(sweep, tmp_path / "out", tmp_path / "runs", progress=False)
    assert outcome.table["accuracy"].notna().all()
    assert outcome.table[["delta_m", "delta_d", "pearson_r"]].isna().all(axis=None)
    assert outcome.written == (SWEEP_FILE,)


def test_a_cluster_trains_the_same(swept: tuple[Path, Any], tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    folder, _ = swept
    command = ("sweep", folder / "two.yaml", "--out", "out", "--scheduler", "local:2")
    done = wda_command(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here, there = (pd.read_csv(f / "out" / SWEEP_FILE) for f in (folder, tmp_path))
    same = ["run", "accuracy", "trainable", "rank"]
    pd.testing.assert_frame_equal(here[same], there[same])
    close = ["loss", "delta_m", "delta_d", "pearson_r"]
    pd.testing.assert_frame_equal(here[close], there[close], rtol=1e-4)


def test_intervals_over_seeds_are_students() -> None:
    values = [0.71, 0.74, 0.72, float("nan"), 0.79]
    mean, (low, high) = mean_of_repetitions(values)
    known = np.array(values)[~np.isnan(values)]
    expected = stats.t.interval(0.95, 3, loc=known.mean(), scale=stats.sem(known))
    assert (low, mean, high) == pytest.approx((expected[0], known.mean(), expected[1]))
    mean, interval = mean_of_repetitions([0.5])
    assert mean == 0.5
    assert np.isnan(interval).all()
    assert np.isnan(mean_of_repetitions([])[0])


def results(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"method": "lora", "seed": 0, **columns})


def test_the_figure_shows_means_intervals_and_every_run() -> None:
    table = results(rank=[4, 4, 4, 16, 16, 16], accuracy=[0.6, 0.7, 0.65, 0.7, 0.8, 0.72])
    ax = figures.repetitions(table, "rank")
    (bars,) = ax.containers
    line, _, (stems,) = bars
    np.testing.assert_allclose(line.get_xydata(), [[4, 0.65], [16, 0.74]])
    for (_, interval), segment in zip(
        (mean_of_repetitions(table["accuracy"][:3]), mean_of_repetitions(table["accuracy"][3:])),
        stems.get_segments(),
        strict=True,
    ):
        np.testing.assert_allclose(segment[:, 1], interval)
    (dots,) = ax.collections[:1]
    assert len(dots.get_offsets()) == 6
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("rank r", "held-out accuracy")
    words = figures.repetitions(
        results(targets=["query", "key+value"], accuracy=[0.5, 0.6]), "targets"
    )
    assert [label.get_text().replace("\n", "") for label in words.get_xticklabels()] == [
        "query",
        "key+value",
    ]
    with pytest.raises(TableError, match="repetitions: no row has a finite accuracy"):
        figures.repetitions(results(rank=[4], accuracy=[np.nan]), "rank")


def test_each_method_is_shown_at_its_best_setting() -> None:
    """The highest mean over the seeds, not the highest run."""
    rank = [2, 2, 4, 4]
    lora = results(rank=rank, accuracy=[0.6, 0.61, 0.5, 0.7])
    dora = results(rank=rank, accuracy=[0.9, 0.1, 0.55, 0.56]).assign(method="dora")
    ft = results(rank=[np.nan, np.nan], accuracy=[0.3, 0.2]).assign(method="ft")
    best = best_settings(pd.concat([lora, dora, ft], ignore_index=True), ["rank"])
    assert list(best.index) == [0, 1, 6, 7, 8, 9]


def test_shipped_sweeps_are_whole() -> None:
    folder = Path(wda.__file__).parent / "recipes/results"
    for file in sorted(folder.glob("*.yaml")):
        runs = load_sweep(file).runs
        seeds = {0} if file.stem == "commonsense" else {0, 1, 2}
        assert {run.recipe.seed for run in runs} == seeds, file
        assert all(isinstance(run.recipe, Recipe) for run in runs)


def test_runs_are_compared_with_their_own_base(trainable: Path, tmp_path: Path) -> None:
    """A packed base lies in the run's folder; what stands beside weights is left out."""
    result = TrainingResult.model_construct()
    plain, series = (
        recipe(trainable, adapter=adapter)
        for adapter in (BOTH[0], {"method": "series", "bottleneck": 2, "targets": ["down"]})
    )
    packed = plain.model_copy(update={"quantised": "nf4"})
    done = [
        Done(Planned(name, asked), tmp_path / name, result)
        for name, asked in (("a", plain), ("b", packed), ("c", series), ("d", plain))
    ]
    done.append(Done(Planned("e", plain), tmp_path / "e", None, "the loss is no number"))
    found = {m.base: [run.name for run in m.runs] for m in _manifests(done, ["query"])}
    assert found == {plain.base: ["a", "d"], str(tmp_path / "b/base"): ["b"]}
