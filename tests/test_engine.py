"""The engine: any executor gives the same bits, memory stays bounded, Ctrl-C ends it."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import HEARING_CTRL_C, WDA, moved, pico_weights, save_model
from servers import STALL, Files, serving

import wda
from wda import engine, schedule
from wda.changes import Moved
from wda.decomposition import Per
from wda.errors import CheckpointError
from wda.updates import Update


def test_any_executor_gives_the_same_bits(runs: dict[str, Path], base: Path) -> None:
    folders = list(runs.values())
    by_default = wda.compare(folders, base=base, cache=False, progress=False).table
    for workers in (1, 3):
        with ThreadPoolExecutor(workers) as executor:
            table = wda.compare(
                folders, base=base, cache=False, executor=executor, progress=False
            ).table
        pd.testing.assert_frame_equal(table, by_default, check_exact=True)
    little = wda.compare(folders, base=base, cache=False, max_memory=1, progress=False).table
    pd.testing.assert_frame_equal(little, by_default, check_exact=True)


@pytest.mark.parametrize("per", ["output", "input"])
def test_updates_that_do_not_fit_together_go_one_after_another(
    per: str, runs: dict[str, Path], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [runs["lora"], runs["dora"]]
    options = {"base": base, "per": per, "cache": False, "progress": False}
    expected = wda.compare(folders, **options).table  # type: ignore[arg-type]
    sizes: list[int] = []
    move = engine.moved

    def counted(w0: torch.Tensor, updates: Sequence[Update], per: Per) -> list[Moved]:
        sizes.append(len(updates))
        return move(w0, updates, per)

    monkeypatch.setattr(engine, "moved", counted)
    monkeypatch.setattr(schedule, "WORKER_BYTES", 1200)  # two adapters' factors, in float64
    little = wda.compare(folders, max_memory=1, **options).table  # type: ignore[arg-type]
    assert sizes == [2] * 18
    pd.testing.assert_frame_equal(little, expected, check_exact=False, rtol=1e-11)


def test_torchs_threads_are_left_as_they_were(runs: dict[str, Path], base: Path) -> None:
    before = torch.get_num_threads()
    wda.compare(runs["lora"], base=base, progress=False)
    assert torch.get_num_threads() == before


def test_a_failure_cancels_what_has_not_begun(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = moved(pico_weights(), 0.01, seed=3)
    tensors["encoder.layer.0.attention.self.query.weight"][0, 0] = float("nan")
    folder = save_model(tmp_path / "nan", tensors)
    begun = []

    def counted(part: engine.Part) -> object:
        begun.append(part)
        time.sleep(0.05)
        return engine.measure_part(part)

    monkeypatch.setattr(schedule, "measure_part", counted)
    with pytest.raises(CheckpointError, match="NaN"), ThreadPoolExecutor(1) as executor:
        wda.compare(folder, base=base, executor=executor, progress=False)
    assert len(begun) < 6


PEAK = Path(__file__).parent.parent / "benchmarks" / "peak.py"


def big_model(folder: Path, layers: int, seed: int) -> Path:
    torch.manual_seed(seed)
    return save_model(
        folder,
        {
            f"layers.{i}.self_attn.{name}_proj.weight": torch.randn(2048, 2048).bfloat16()
            for i in range(layers)
            for name in "qv"
        },
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_model_and_checkpoints(tmp_path: Path) -> None:
    peaks = []
    for layers, checkpoints in ((1, 1), (8, 6)):
        base = big_model(tmp_path / f"base{layers}", layers, seed=0)
        folders = [
            big_model(tmp_path / f"run{layers}-{i}", layers, seed=i + 1) for i in range(checkpoints)
        ]
        command = [sys.executable, PEAK, base, *folders]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < 200  # MiB; the larger case maps 440
    assert peaks[1] < peaks[0] + 64


SLOW = """
import time, wda.schedule
from wda.cli import main
measure = wda.schedule.measure_part
wda.schedule.measure_part = lambda part: (time.sleep(0.3), measure(part))[1]
main()
"""


def interrupted(command: list[object], ready: Callable[[], bool]) -> tuple[float, int, str]:
    """Send Ctrl-C when ready; give the seconds it took to end, the code and standard error."""
    command = [*HEARING_CTRL_C, *map(str, command)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    return time.monotonic() - start, process.returncode, stderr


def rows_kept(folder: Path) -> int:
    if not (folder / "results-2.sqlite").exists():
        return 0
    database = sqlite3.connect(folder / "results-2.sqlite")
    try:
        return int(database.execute("SELECT count(*) FROM results").fetchone()[0])
    except sqlite3.OperationalError:  # the table is not there yet
        return 0
    finally:
        database.close()


def test_ctrl_c_ends_a_comparison_and_keeps_what_is_finished(tmp_path: Path) -> None:
    base = big_model(tmp_path / "base", 24, seed=0)
    runs = [big_model(tmp_path / f"run{i}", 24, seed=i + 1) for i in range(4)]
    out, kept = tmp_path / "out", tmp_path / "kept"
    command = [sys.executable, "-c", SLOW, "compare", *runs, "--base", base]
    command += ["--cache", kept, "--out", out]
    seconds, code, stderr = interrupted(command, lambda: rows_kept(kept) > 0)
    assert (code, stderr) == (130, "wda: interrupted; what was finished is kept\n")
    assert seconds < 2
    assert not out.exists()
    assert 0 < rows_kept(kept) < 192


def test_a_file_cut_short_in_the_middle_of_reading_is_named_in_one_line(tmp_path: Path) -> None:
    base = big_model(tmp_path / "base", 24, seed=0)
    run, kept = big_model(tmp_path / "run", 24, seed=1), tmp_path / "kept"
    command = [sys.executable, "-c", SLOW, "compare", run, "--base", base, "--cache", kept]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    while not rows_kept(kept):
        assert process.poll() is None
        time.sleep(0.02)
    os.truncate(run / "model.safetensors", 1 << 20)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert stderr.count("\n") == 1
    assert "a file was cut short while it was read" in stderr or "changed while" in stderr


def test_threads_that_lose_the_same_file_say_so_once() -> None:
    code = (
        "import os, threading, time\n"
        "from wda import signals\n"
        "write = os.write\n"
        "os.write = lambda to, text: (write(to, text), time.sleep(0.3))\n"
        "threads = [threading.Thread(target=signals._end, args=(7,)) for _ in range(4)]\n"
        "for thread in threads:\n    thread.start()\n"
        "time.sleep(20)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=15)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_ctrl_c_does_not_wait_for_a_server_that_stalls(tmp_path: Path) -> None:
    base = big_model(tmp_path / "base", 1, seed=0)
    big_model(tmp_path / "site", 1, seed=1)
    with serving(Files, tmp_path / "site") as (handler, address):
        handler.faults["model.safetensors"] = ["", *["stall"] * 100]
        command = [WDA, "compare", address, "--base", base, "--no-cache"]

        def stalled() -> bool:
            return len(handler.faults["model.safetensors"]) < 100

        seconds, code, _ = interrupted([*command], stalled)
    assert code == 130
    assert seconds < 2 < STALL
