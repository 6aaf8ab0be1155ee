"""Results that are kept: found when nothing changed, and only then; safe whatever happens."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import HEARING_CTRL_C, moved, pico_weights, save_model, save_pico_adapter, wda_command
from servers import Files, serving

import wda
from wda import cache, schedule
from wda.errors import OutputError


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None]]:
    """What was measured, not taken from the cache: matrix and step."""
    seen: list[tuple[str, int | None]] = []
    measure_part = schedule.measure_part

    def watched(part: schedule.Part) -> list[schedule.Moved]:
        seen.extend((str(part.matrix), source.member.step) for source in part.sources)
        return measure_part(part)

    monkeypatch.setattr(schedule, "measure_part", watched)
    return seen


def compare(runs: object, base: Path, folder: Path, **options: object) -> wda.Comparison:
    return wda.compare(runs, base=base, cache=folder, progress=False, **options)  # type: ignore[arg-type]


def test_nothing_is_computed_twice(
    runs: dict[str, Path], base: Path, tmp_path: Path, measured: list[object]
) -> None:
    folders = list(runs.values())
    first = compare(folders, base, tmp_path / "c")
    assert len(measured) == len(first.table) == 54
    measured.clear()
    again = compare(folders, base, tmp_path / "c")
    assert measured == []
    pd.testing.assert_frame_equal(again.table, first.table, check_exact=True)
    assert again.provenance["rows_computed_before"] == 54
    assert any("54 rows were computed before" in note for note in again.notes)
    anew = wda.compare(folders, base=base, cache=False, progress=False)
    assert len(measured) == 54
    pd.testing.assert_frame_equal(anew.table, first.table, check_exact=True)


def test_one_more_checkpoint_costs_one_checkpoint(
    runs: dict[str, Path], base: Path, tmp_path: Path, measured: list[tuple[str, int | None]]
) -> None:
    compare(runs["ft"], base, tmp_path / "c")
    measured.clear()
    save_model(runs["ft"] / "checkpoint-200", moved(pico_weights(), 0.5, seed=9))
    table = compare(runs["ft"], base, tmp_path / "c").table
    assert len(table) == 24
    assert [step for _, step in measured] == [200] * 6
    fresh = wda.compare(runs["ft"], base=base, cache=False, progress=False).table
    # Some processors sum two checkpoints at a time in another order than one alone.
    pd.testing.assert_frame_equal(table, fresh, check_exact=False, rtol=1e-12)


def test_what_changed_is_computed_anew(
    runs: dict[str, Path], base: Path, tmp_path: Path, measured: list[object]
) -> None:
    def computed(what: Path = runs["lora"], of: Path = base, **options: object) -> int:
        measured.clear()
        compare(what, of, tmp_path / "c", **options)
        return len(measured)

    assert (computed(), computed()) == (18, 0)
    assert (computed(per="input"), computed(per="input")) == (18, 0)
    assert computed(matrices=["query"]) == 0
    # The same tensors at another scaling.
    config = runs["lora"] / "checkpoint-10" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 6}))
    assert (computed(), computed()) == (6, 0)
    # Other numbers in a file of the same name and size.
    file = runs["lora"] / "checkpoint-9" / "adapter_model.safetensors"
    size = file.stat().st_size
    save_pico_adapter(file.parent, seed=77, base_model_name_or_path=str(base))
    assert file.stat().st_size == size
    assert (computed(), computed()) == (6, 0)
    # Another base.
    other = save_model(tmp_path / "other", pico_weights(seed=5))
    assert (computed(of=other), computed()) == (18, 0)


def test_other_code_computes_anew(
    runs: dict[str, Path],
    base: Path,
    tmp_path: Path,
    measured: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare(runs["lora"], base, tmp_path / "c")
    measured.clear()
    monkeypatch.setattr(cache, "_code", lambda: "another")
    compare(runs["lora"], base, tmp_path / "c")
    assert len(measured) == 18


def test_files_elsewhere_count_by_their_mark(
    tmp_path: Path, base: Path, measured: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "far", moved(pico_weights(), 0.1, seed=1))
    with serving(Files, folder) as (handler, address):
        compare(address, base, tmp_path / "c")
        handler.served.clear()
        compare(address, base, tmp_path / "c")
        assert len(measured) == 6
        assert sum(handler.served.values()) < 3000  # headers alone
        save_model(folder, moved(pico_weights(), 0.1, seed=2))
        compare(address, base, tmp_path / "c")
        assert len(measured) == 12
        # A server that says nothing of its files: no one can tell whether they changed.
        monkeypatch.setattr("wda.remote.http.Site.mark", lambda _self, _key: None)
        compare(address, base, tmp_path / "c")
        compare(address, base, tmp_path / "c")
        assert len(measured) == 24


KILLED = """
    import os, signal, sys, time
    import wda, wda.cache, wda.schedule
    wda.cache._SECONDS_BETWEEN_COMMITS = 0
    measure, count = wda.schedule.measure_part, 0
    def slow(part):
        global count
        count += 1
        if count > 3:
            time.sleep(0.5)  # the first three are finished and written
            os.kill(os.getpid(), {signal})
            time.sleep(0.5)
        return measure(part)
    wda.schedule.measure_part = slow
    wda.compare(sys.argv[2], base=sys.argv[1], cache=sys.argv[3], max_memory=1, progress=False)
"""


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT], ids=str)
def test_an_interrupted_comparison_continues(
    way: signal.Signals,
    runs: dict[str, Path],
    base: Path,
    tmp_path: Path,
    measured: list[object],
) -> None:
    code = textwrap.dedent(KILLED.format(signal=int(way)))
    command = [*HEARING_CTRL_C, sys.executable, "-c", code, base, runs["ft"], tmp_path / "c"]
    done = subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
    assert done.returncode != 0
    table = compare(runs["ft"], base, tmp_path / "c").table
    assert 0 < len(measured) <= 9  # of 18: three matrices of six were finished
    fresh = wda.compare(runs["ft"], base=base, cache=False, progress=False).table
    # Some processors sum two checkpoints at a time in another order than one alone.
    pd.testing.assert_frame_equal(table, fresh, check_exact=False, rtol=1e-12)


def test_two_processes_share_a_cache(tmp_path: Path, base: Path) -> None:
    folders = [save_model(tmp_path / f"{i}", moved(pico_weights(), 0.1, seed=i)) for i in range(8)]
    code = (
        "import sys, wda, wda.cache\nwda.cache._SECONDS_BETWEEN_COMMITS = 0\n"
        "for run in sys.argv[3:]:\n"
        "    wda.compare(run, base=sys.argv[1], cache=sys.argv[2], progress=False)\n"
    )
    arguments = [base, tmp_path / "c", *folders]
    processes = [subprocess.Popen([sys.executable, "-c", code, *arguments]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    file = tmp_path / "c" / cache.FILE
    database = sqlite3.connect(file)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert database.execute("SELECT count(*) FROM results").fetchone() == (
        48 + 6,
    )  # and the norms of six matrices
    database.close()
    kept = wda.compare(folders, base=base, cache=tmp_path / "c", progress=False)
    assert kept.provenance["rows_computed_before"] == 48
    fresh = wda.compare(folders, base=base, cache=False, progress=False)
    # Some processors sum two checkpoints at a time in another order than one alone.
    pd.testing.assert_frame_equal(kept.table, fresh.table, check_exact=False, rtol=1e-12)


def test_threads_may_compare_at_once(tmp_path: Path, runs: dict[str, Path], base: Path) -> None:
    failed = []

    def run(folder: Path) -> None:
        try:
            compare(folder, base, tmp_path / "c")
        except BaseException as error:  # whatever it is
            failed.append(error)

    threads = [threading.Thread(target=run, args=(folder,)) for folder in runs.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_a_cache_that_cannot_be_used(
    tmp_path: Path, runs: dict[str, Path], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / cache.FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(OutputError, match="delete the file if it is damaged, or use --no-cache"):
        compare(runs["ft"], base, damaged)
    with pytest.raises(OutputError, match="choose another folder for --cache"):
        compare(runs["ft"], base, tmp_path / "damaged" / cache.FILE)
    # Nobody asked for the user's own folder: the work goes on, and it is said once.
    monkeypatch.setattr(cache, "user_cache_path", lambda _name: damaged)
    comparison = wda.compare(runs["ft"], base=base, progress=False)
    assert len(comparison.table) == 18
    assert [note for note in comparison.notes if "could not be kept" in note] != []


def test_a_disk_that_fills_costs_no_more_than_the_cache(
    tmp_path: Path, runs: dict[str, Path], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(runs["lora"], base, tmp_path / "c")
    connect = cache._connect

    def limited(file: Path) -> sqlite3.Connection:
        database = connect(file)
        database.execute("PRAGMA max_page_count = 1")  # as many as there are, in truth
        return database

    monkeypatch.setattr(cache, "_connect", limited)
    many = [save_model(tmp_path / f"{i}", moved(pico_weights(), 0.1, seed=i)) for i in range(12)]
    comparison = wda.compare(many, base=base, cache=tmp_path / "c", progress=False)
    assert len(comparison.table) == 72
    assert any("database or disk is full" in note for note in comparison.notes)
    monkeypatch.undo()
    assert compare(runs["lora"], base, tmp_path / "c").provenance["rows_computed_before"] == 18


def test_command_line(tmp_path: Path, runs: dict[str, Path], base: Path) -> None:
    command = ("compare", runs["lora"], "--base", base, "--json")
    first = wda_command(*command, "--cache", "kept", cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    assert (tmp_path / "kept" / cache.FILE).is_file()
    again = wda_command(*command, "--cache", "kept", cwd=tmp_path)
    assert again.stdout == first.stdout
    assert "18 rows were computed before" in again.stderr
    anew = wda_command(*command, "--no-cache", cwd=tmp_path)
    assert (anew.stdout, anew.stderr) == (first.stdout, "")
    both = wda_command(*command, "--no-cache", "--cache", "kept", cwd=tmp_path)
    assert both.returncode == 2
    default = wda_command(*command, cwd=tmp_path)
    assert default.returncode == 0
    assert (Path(os.environ["XDG_CACHE_HOME"]) / "wda" / cache.FILE).is_file()


def test_numbers_survive_to_the_last_bit(tmp_path: Path, base: Path) -> None:
    """Also the one that is none: ΔD where no vector has a direction."""
    tensors = pico_weights()
    tensors["encoder.layer.0.attention.self.query.weight"].zero_()
    tensors["encoder.layer.1.attention.self.query.weight"].mul_(torch.pi)
    save_model(tmp_path / "a", tensors)
    first, again = (compare(tmp_path / "a", base, tmp_path / "c").table for _ in range(2))
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    assert first["delta_d"].isna().sum() == 1
