"""The command line as a user meets it: files, columns, exit codes, messages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

import wda
from wda import comparison as comparison_module
from wda.cli import app
from wda.figures import KINDS

ROOT = Path(__file__).parent.parent
CONTRACT_TABLE = {
    *("run", "method", "seed", "step", "module", "layer", "matrix", "per"),
    *("out_features", "in_features", "n_vectors", "delta_m", "delta_d", "dtype"),
}
CONTRACT_STATISTICS = {
    *("run", "method", "matrix", "per"),
    *("n", "pearson_r", "slope", "intercept"),
}
CONTRACT_FILES = {
    "table.parquet",
    "table.csv",
    "statistics.csv",
    "scatter.png",
    "scatter.pdf",
    "provenance.json",
    "nulls.parquet",
    "comparisons.csv",
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plain(text: str) -> str:
    """Take the frame away that is drawn around wrong usage."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def compared(runs: dict[str, Path], base: Path, out: Path, *more: object) -> Result:
    return run("compare", *runs.values(), "--base", base, "--out", out, *more)


def test_compare_writes_the_files_and_columns_of_the_contract(
    runs: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out"
    result = compared(runs, base, out, "--matrices", "query,value")
    assert result.exit_code == 0, result.output
    assert {file.name for file in out.iterdir()} == CONTRACT_FILES
    table = pd.read_parquet(out / "table.parquet")
    assert set(table.columns) >= CONTRACT_TABLE
    assert len(table) == 3 * 3 * 6
    statistics = pd.read_csv(out / "statistics.csv")
    assert set(statistics.columns) >= CONTRACT_STATISTICS
    assert list(statistics["matrix"]) == ["query", "value", "all"] * 3
    assert list(statistics["run"].unique()) == ["ft", "lora", "dora"]
    assert list(statistics["method"].unique()) == ["ft", "lora", "dora"]
    assert "pearson_r" in result.stdout
    assert "dora" in result.stdout


def test_csv_and_parquet_hold_the_same_numbers_to_the_last_digit(
    runs: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    compared(runs, base, tmp_path / "out")
    parquet = wda.read_table(tmp_path / "out" / "table.parquet")
    csv = wda.read_table(str(tmp_path / "out" / "table.csv"))
    pd.testing.assert_frame_equal(parquet, csv, check_exact=True)
    api = wda.compare(list(runs.values()), base=base, progress=False)
    pd.testing.assert_frame_equal(parquet, api.table, check_exact=True)


def test_provenance_tells_what_was_done(runs: dict[str, Path], base: Path, tmp_path: Path) -> None:
    compared(runs, base, tmp_path / "out", "--per", "input")
    facts = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert facts["per"] == "input"
    assert facts["wda"] == wda.__version__
    assert facts["base"]["location"] == str(base)
    assert re.fullmatch("[0-9a-f]{64}", facts["base"]["files"][0]["sha256"])
    assert [c["step"] for c in facts["checkpoints"]] == [9, 10, 100] * 3
    assert {"torch", "numpy", "pandas"} <= set(facts["libraries"])


def test_json_goes_to_standard_output_alone(runs: dict[str, Path], base: Path) -> None:
    result = run("compare", runs["lora"], "--base", base, "--json")
    statistics = json.loads(result.stdout)
    assert [row["matrix"] for row in statistics] == ["query", "value", "all"]
    api = wda.compare(runs["lora"], base=base, progress=False).statistics
    assert statistics[0]["slope"] == pytest.approx(api["slope"].iloc[0], rel=1e-12)


def test_figures_redraws_the_same_from_either_table(
    runs: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    compared(runs, base, tmp_path / "out")
    for ending in ("parquet", "csv"):
        again = tmp_path / ending
        result = run("figures", tmp_path / "out" / f"table.{ending}", "--out", again)
        assert result.exit_code == 0, result.output
        for name in ("scatter.png", "statistics.csv", "table.csv"):
            assert (again / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_figures_of_other_kinds_are_drawn_on_request(
    runs: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    compared(runs, base, tmp_path / "out")
    again = tmp_path / "again"
    result = run("figures", tmp_path / "out", "--kind", "profile, heatmap,profile", "--out", again)
    assert result.exit_code == 0, result.output
    maps = [f"heatmap{m}_{q}" for q in ("delta_m", "delta_d") for m in ("", "_matrices")]
    assert {file.stem for file in again.glob("*.png")} == {"profile", *maps}
    assert {file.stem for file in again.glob("*.pdf")} == {"profile", *maps}
    assert (again / "statistics.csv").is_file()
    assert "tables, profile.png, profile.pdf, heatmap_delta_m.png" in result.stderr
    for name in KINDS:
        assert name in run("figures", "--help").stdout
    none = tmp_path / "none"
    line = one_line(run("figures", tmp_path / "out", "--kind", "scatter,vectors", "--out", none))
    assert "vectors: is drawn from vectors.parquet, which --vectors writes, and none lies" in line
    assert not none.exists()
    for kind in ("scater", "scatter,", ""):
        wrong = run("figures", tmp_path / "out", "--kind", kind, "--out", none)
        assert wrong.exit_code == 2
        assert "there are scatter, profile, trajectory, heatmap, vectors" in plain(wrong.stderr)


def test_help_shows_worked_examples() -> None:
    result = run("compare", "--help")
    assert result.exit_code == 0
    assert "wda compare runs/ft runs/lora runs/dora" in " ".join(result.stdout.split())
    for command in ("compare", "figures", "train", "demo"):
        assert f"wda {command}" in run(command, "--help").stdout
    assert run("--version").stdout == f"wda {wda.__version__}\n"


def one_line(result: Result) -> str:
    assert result.exit_code == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("wda: ")
    assert "Traceback" not in result.output
    return lines[0]


def test_mistakes_are_one_line_and_exit_code_1(
    runs: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        ((tmp_path / "nowhere", "--base", base), "nowhere: no such file or folder; give a path"),
        ((tmp_path / "empty", "--base", base), "no checkpoint here"),
        ((runs["ft"],), "base: the pre-trained model is not known"),
        ((runs["ft"], "--base", tmp_path / "gone"), "gone: no such file or folder"),
        ((runs["ft"], "--base", base, "--matrices", "quarry"), "labels that exist here: "),
        ((runs["ft"], "--base", base, "--matrices", ","), "nothing was asked for"),
        ((tmp_path / "m.yaml",), "m.yaml: cannot be read"),
    ]:
        assert message in one_line(run("compare", *arguments, "--out", out))
        assert not out.exists()  # nothing half-written left behind


def test_wrong_usage_is_exit_code_2(runs: dict[str, Path]) -> None:
    assert run("compare").exit_code == 2
    assert run("compare", runs["ft"], "--per", "row").exit_code == 2
    assert run("compare", runs["ft"], "--nonsense").exit_code == 2
    assert run("compere").exit_code == 2


def test_a_place_that_cannot_be_written_fails_before_the_work(
    runs: dict[str, Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(comparison_module, "open_all", None)  # the work would fail on it
    line = one_line(compared(runs, base, tmp_path / "file" / "out"))
    assert "cannot be written to: Not a directory; choose another folder" in line


def test_a_full_disk_leaves_old_results_alone(
    runs: dict[str, Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compared(runs, base, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    assert "No space left on device; make room" in one_line(
        compared(runs, base, out, "--per", "input")
    )
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_broken_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nonsense")
    (tmp_path / "t.txt").write_text("")
    for name, message in [
        ("t.csv", "columns missing: run, method"),
        ("t.parquet", "cannot be read as a table"),
        ("t.txt", "a table ends in .parquet or .csv"),
        ("none.csv", "no such table"),
    ]:
        assert message in one_line(run("figures", tmp_path / name, "--out", tmp_path / "out"))


def test_the_installed_command_works() -> None:
    command = Path(sys.executable).parent / "wda"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("wda ")
