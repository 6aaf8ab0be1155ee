"""The engine: any executor gives the same bits, memory stays bounded, Ctrl-C ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import moved, pico_weights, save_model

import wda
from wda import engine, schedule
from wda.errors import CheckpointError


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
    import os, sys, time, wda.comparison, wda.schedule
    measure = wda.schedule.measure_part
    def slow(part):
        time.sleep(0.5)
        moved = measure(part)
        os.write(1, b"one done" + bytes([10]))
        return moved
    wda.schedule.measure_part = slow
    wda.comparison.compare([sys.argv[2]], base=sys.argv[1], matrices=["query"])
"""


def test_ctrl_c_ends_a_comparison_after_the_units_under_way(tmp_path: Path) -> None:
    base = big_model(tmp_path / "base", 24, seed=0)
    run = big_model(tmp_path / "run", 24, seed=1)
    code = textwrap.dedent(SLOW)
    process = subprocess.Popen(
        [sys.executable, "-c", code, base, run],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "one done\n"
    process.send_signal(signal.SIGINT)
    finished_after = process.communicate(timeout=60)[0].count("one done")
    assert finished_after <= 2 * (os.cpu_count() or 1)  # those under way, not the dozens to come
    assert process.returncode != 0
