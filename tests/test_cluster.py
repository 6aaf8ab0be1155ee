"""Work done elsewhere: the same bits, whatever happens to those who do it."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import save_model, wda_command
from servers import Files, serving

import wda
from wda import cluster, schedule
from wda.changes import Vectors
from wda.checkpoints import open_base
from wda.cluster import executor_of
from wda.errors import CheckpointError, ClusterError
from wda.manifest import Run
from wda.pairing import pair
from wda.runs import open_runs

distributed = pytest.importorskip("distributed")


def several(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base and runs whose matrices are cut into several units."""
    torch.manual_seed(0)
    names = [f"layers.{i}.self_attn.{n}_proj.weight" for i in range(2) for n in "qv"]
    tensors = {name: torch.randn(300, 200).bfloat16() for name in names}
    base = save_model(tmp_path / "base", tensors)
    runs = []
    for i, dtype in enumerate((torch.float32, torch.bfloat16)):
        wt = {
            n: (w.float() * (1 + i) + 0.1 * torch.randn(w.shape)).to(dtype)
            for n, w in tensors.items()
        }
        runs.append(save_model(tmp_path / f"run{i}", wt))
    return base, runs


@pytest.fixture(scope="module")
def workers() -> Any:
    """Two real worker processes and a client of theirs."""
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address=":0"
        ) as found,
        distributed.Client(found) as client,
    ):
        yield client


@pytest.mark.parametrize("per", ["output", "input"])
def test_a_cluster_gives_the_same_bits(
    per: Any, workers: Any, runs: dict[str, Path], base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(schedule, "UNIT_ELEMENTS", 50 * 200 * 2)
    for of, what in ((base, list(runs.values())), several(tmp_path / "more")):
        here = wda.compare(what, base=of, per=per, cache=False, progress=False)
        there = wda.compare(
            what,
            base=of,
            per=per,
            cache=False,
            progress=False,
            executor=workers.get_executor(pure=False),
        )
        pd.testing.assert_frame_equal(here.table, there.table, check_exact=True)


def test_any_executor_of_processes_does(tmp_path: Path) -> None:
    base, runs = several(tmp_path)
    here = wda.compare(runs, base=base, cache=False, progress=False).table
    with ProcessPoolExecutor(2, get_context("spawn")) as executor:
        there = wda.compare(runs, base=base, cache=False, executor=executor, progress=False).table
    pd.testing.assert_frame_equal(here, there, check_exact=True)


def test_workers_read_from_afar_themselves(workers: Any, tmp_path: Path) -> None:
    base, runs = several(tmp_path / "site")
    here = wda.compare(runs, base=base, cache=False, progress=False).table
    with serving(Files, tmp_path / "site") as (_, address):
        there = wda.compare(
            [f"{address}/{run.name}" for run in runs],
            base=f"{address}/base",
            cache=False,
            executor=workers.get_executor(pure=False),
            progress=False,
        ).table
    pd.testing.assert_frame_equal(here, there, check_exact=True)


def test_a_killed_worker_costs_nothing_but_time(workers: Any, tmp_path: Path) -> None:
    base, runs = several(tmp_path)
    expected = wda.compare(runs, base=base, cache=False, progress=False).table
    here = os.getpid()
    victims = tmp_path / "victims"

    class Deadly(Executor):
        """Kills the worker that comes to the third unit first, in the middle of it."""

        def submit(self, function: Any, part: Any, /) -> Future[Any]:  # type: ignore[override]
            def deadly(part: Any, marked: bool) -> Any:
                if marked and not victims.exists():
                    victims.write_text(str(os.getpid()))
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(part)

            self.count = getattr(self, "count", 0) + 1
            return inner.submit(deadly, part, self.count == 3)

    inner = workers.get_executor(pure=False)
    table = wda.compare(runs, base=base, cache=False, executor=Deadly(), progress=False).table
    pd.testing.assert_frame_equal(table, expected, check_exact=True)
    assert int(victims.read_text()) != here


def test_bad_numbers_are_told_from_afar(workers: Any, tmp_path: Path) -> None:
    tensors = {"layers.0.self_attn.q_proj.weight": torch.full((300, 200), float("nan"))}
    save_model(tmp_path / "b", {"layers.0.self_attn.q_proj.weight": torch.ones(300, 200)})
    with pytest.raises(CheckpointError, match="holds NaN or Inf in 300 of 300 vectors"):
        wda.compare(
            save_model(tmp_path / "nan", tensors),
            base=tmp_path / "b",
            matrices="query",
            executor=workers.get_executor(pure=False),
            progress=False,
        )


def test_progress_counts_the_units_of_all_workers(
    workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "UNIT_ELEMENTS", 50 * 200)
    base, runs = several(tmp_path)
    opened, members = open_base(base), open_runs([Run(name="a", path=str(runs[0]))])
    pairings, _ = pair(opened, members, ["query", "value"])
    seen: list[tuple[int, int]] = []
    work = schedule.Work(executor=workers.get_executor(pure=False))
    schedule.measure(
        opened,
        pairings,
        Vectors("output"),
        work,
        on_part=lambda done, total, _matrix: seen.append((done, total)),
    )
    assert seen == [(i + 1, 24) for i in range(24)]


def test_workers_that_find_other_files_say_so(workers: Any, tmp_path: Path) -> None:
    base, runs = several(tmp_path)
    members = open_runs([Run(name="a", path=str(runs[0]))])
    opened = open_base(base)
    pairings, _ = pair(opened, members, ["query"])
    (runs[0] / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    work = schedule.Work(executor=workers.get_executor(pure=False))
    with pytest.raises(CheckpointError, match="workers must reach the same files"):
        schedule.measure(opened, pairings, Vectors("output"), work)


def test_what_is_no_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_SECONDS_TO_CONNECT", 1)
    for scheduler, message in (
        ("10.0.0.7", "is not one; give tcp://HOST:PORT"),
        ("local:0", "give local:1 or more"),
        ("tcp://127.0.0.1:9", "nobody answers there"),
    ):
        with pytest.raises(ClusterError, match=message), executor_of(scheduler):
            pass


def test_workers_with_another_wda_are_refused(
    workers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "__version__", "99")
    with (
        pytest.raises(ClusterError, match="this machine has 99; install the same"),
        executor_of(workers.scheduler.address),
    ):
        pass


def test_command_line(tmp_path: Path, runs: dict[str, Path], base: Path) -> None:
    command = ("compare", runs["lora"], runs["ft"], "--base", base, "--no-cache", "--out")
    assert wda_command(*command, "here", cwd=tmp_path).returncode == 0
    done = wda_command(*command, "there", "--scheduler", "local:2", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("written to")) == (0, 1), done.stderr
    here, there = (pd.read_parquet(tmp_path / out / "table.parquet") for out in ("here", "there"))
    pd.testing.assert_frame_equal(here, there, check_exact=True)
    wrong = wda_command(*command, "not", "--scheduler", "slurm", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert not (tmp_path / "not").exists()
