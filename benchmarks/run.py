"""Measures wda against its peers, side by side in one run, and writes docs/benchmarks.md.

Run it by: make bench. It needs a few GiB of disk and of page cache for its random checkpoints.
"""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numba
import numpy as np
import pandas as pd
import peft
import torch

sys.path.insert(0, str(Path(__file__).parent))
import adapters as training
import material
import peers
from rich.console import Console
from timing import REPEATS, side_by_side

import wda
from wda import style
from wda.changes import Vectors
from wda.checkpoints import open_base
from wda.manifest import make_manifest
from wda.pairing import pair
from wda.runs import open_runs
from wda.schedule import Work, measure

ROOT = Path(__file__).parent.parent
MATRICES, CHECKPOINTS, RANK = 8, 4, 16
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def engine_alone(base: Path, checkpoints: list[Path]) -> Callable[[], object]:
    """Give the measuring itself, of opened and paired checkpoints, for rates of bytes and flops."""
    members = open_runs(make_manifest(checkpoints).runs)
    opened = open_base(base)
    pairings, _ = pair(opened, members, ["query", "value"])
    return lambda: measure(opened, pairings, Vectors("output"), Work())


def tabled(base: Path, checkpoints: list[Path]) -> Callable[[], object]:
    """Give the way from paths to the table, which is what the peers compute."""
    options = {"cache": False, "null": None, "progress": False}
    return lambda: wda.compare(checkpoints, base=base, **options).table


def printed(base: Path, checkpoints: list[Path]) -> Callable[[], object]:
    """Give all that wda compare does by default: random updates and fits with intervals, too."""
    return lambda: wda.compare(checkpoints, base=base, cache=False, progress=False).statistics


def dense_rows(base: Path, full: list[Path]) -> list[tuple[str, str, str]]:
    """Dense checkpoints against the notebook, and against reading the same bytes."""
    arrays = peers.open_mapped([base, *full])
    total = sum(a.nbytes for a in arrays)
    t = side_by_side(
        wda=tabled(base, full),
        whole=printed(base, full),
        engine=engine_alone(base, full),
        notebook=lambda: peers.notebook(base, full),
        streaming=lambda: peers.streaming(arrays, THREADS),
    )
    rate, stream = total / t["engine"] / 1e9, total / t["streaming"] / 1e9
    return [
        (
            f"dense: the table, {t['wda']:.2f} s, against the notebook, {t['notebook']:.2f} s",
            "≥ 10",
            f"{t['notebook'] / t['wda']:.1f}",
        ),
        (
            f"the same with random updates, intervals and readings, {t['whole']:.2f} s",
            "–",
            f"{t['notebook'] / t['whole']:.1f}",
        ),
        (
            f"the engine alone, {rate:.1f} GB/s, of a streaming read, {stream:.1f} GB/s",
            "≥ 0.5",
            f"{rate / stream:.2f}",
        ),
    ]


def adapter_rows(base: Path, adapters: dict[str, list[Path]]) -> list[tuple[str, str, str]]:
    """Adapters against merging, and against the machine's matrix multiply."""
    flops = 2 * material.SIZE**2 * RANK * CHECKPOINTS * MATRICES
    rows = []
    for method, folders in adapters.items():
        t = side_by_side(
            wda=tabled(base, folders),
            whole=printed(base, folders),
            engine=engine_alone(base, folders),
            merging=lambda folders=folders: peers.merging(base, folders),
            gemm64=lambda: peers.matrix_multiply(torch.float64, 1024),
            gemm32=lambda: peers.matrix_multiply(torch.float32, 1024),
        )
        multiply = 2 * material.SIZE**2 * 1024
        ours = flops / t["engine"] / 1e9
        double, single = multiply / t["gemm64"] / 1e9, multiply / t["gemm32"] / 1e9
        rows += [
            (
                f"{method}: the table, {t['wda']:.2f} s, against merging, {t['merging']:.2f} s",
                "≥ 5",
                f"{t['merging'] / t['wda']:.1f}",
            ),
            (
                f"{method}: the same with random updates, intervals and readings, "
                f"{t['whole']:.2f} s",
                "–",
                f"{t['merging'] / t['whole']:.1f}",
            ),
            (
                f"{method}: the engine alone, {ours:.0f} Gflop/s, of float64 matrix multiply, "
                f"{double:.0f} Gflop/s",
                "≥ 0.5",
                f"{ours / double:.2f}",
            ),
            (
                f"{method}: the same of float32 matrix multiply, {single:.0f} Gflop/s",
                "≥ 0.5",
                f"{ours / single:.2f}",
            ),
        ]
    return rows


def start_up_row() -> tuple[str, str, str]:
    """Time `wda --help` as a process."""
    command = [str(Path(sys.executable).parent / "wda"), "--help"]
    t = side_by_side(help=lambda: subprocess.run(command, capture_output=True, check=True))
    return "start-up: `wda --help`, seconds", "≤ 0.5", f"{t['help']:.2f}"


def memory_rows(base: Path, runs: dict[str, list[Path]]) -> list[tuple[str, str, str]]:
    """Measure the peak of anonymous memory above the interpreter, in a process of its own."""
    rows = []
    for name, folders in runs.items():
        command = [sys.executable, str(Path(__file__).parent / "peak.py"), base, *folders]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
        rows.append((f"peak memory, {name}, MiB", "≤ 512", done.stdout.strip()))
    return rows


def growth(folder: Path) -> pd.DataFrame:
    """Measure how the engine's time grows with matrices, checkpoints and rank."""
    rows = []
    base = material.make_base(folder / "growth", 8)
    full = [material.make_full(folder / f"g-full-{i}", base, i) for i in range(4)]
    cases: list[tuple[str, int, Callable[[], object]]] = []
    for n in (1, 2, 4):
        cases.append(("checkpoints, dense, 8 matrices", n, engine_alone(base, full[:n])))
    for rank in (4, 16, 64):
        adapters = [
            material.make_adapter(folder / f"g-{rank}-{i}", 8, rank, False, i) for i in range(4)
        ]
        cases.append(("rank, LoRA, 8 matrices, 4 checkpoints", rank, engine_alone(base, adapters)))
    for n in (2, 4, 8):
        members = open_runs(make_manifest(full).runs)
        opened = open_base(base)
        pairings, _ = pair(opened, members, ["query", "value"])
        part = pairings[:n]
        cases.append(
            (
                "matrices, dense, 4 checkpoints",
                n,
                lambda opened=opened, part=part: measure(opened, part, Vectors("output"), Work()),
            )
        )
    for what, size, way in cases:
        rows.append({"what": what, "size": size, "seconds": side_by_side(way=way)["way"]})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, file: Path) -> None:
    """Draw the growth, each kind on its own axes, from zero."""
    kinds = list(dict.fromkeys(table["what"]))
    with style.paper_style():
        figure, axes = plt.subplots(1, len(kinds), figsize=(6.75, 2.0), layout="constrained")
        for ax, kind in zip(axes, kinds, strict=True):
            points = table[table["what"] == kind]
            sizes, milliseconds = points["size"], 1000 * points["seconds"]
            ax.plot(sizes, milliseconds, "o-", color=style.RUN_COLOURS[0])
            what, _, rest = kind.partition(", ")
            ax.set(xlabel=f"{what}\n({rest})", ylabel="milliseconds")
            ax.set(xlim=(0, 1.08 * sizes.max()), ylim=(0, 1.08 * milliseconds.max()))
        figure.savefig(file)


def tabulated(rows: list[tuple[str, str, str]]) -> str:
    """Give rows as a table in Markdown."""
    header = [("ratio or figure", "target", "measured"), ("---", "---", "---")]
    return "\n".join(f"| {' | '.join(row)} |" for row in header + rows)


def page(
    rows: list[tuple[str, str, str]],
    trained: list[tuple[str, str, str]],
    growth_table: pd.DataFrame,
) -> str:
    """Give the page of results."""
    grown = "\n".join(
        f"| {row.what} | {row.size} | {row.seconds:.3f} |" for row in growth_table.itertuples()
    )
    now = datetime.datetime.now(datetime.UTC).date()
    return f"""# Benchmarks

Made by `make bench` on {now}: {_processor()}, {THREADS} threads, Python
{platform.python_version()}, torch {torch.__version__}, numba {numba.__version__}.
{MATRICES} matrices of {material.SIZE}×{material.SIZE} in bfloat16, {CHECKPOINTS} checkpoints,
adapters of rank {RANK}; files in the page cache. All ways of a row run in turn, {REPEATS} times
over, and the shortest time of each counts.

## Comparing

{tabulated(rows)}

*Notebook*: `load_file`, `float()`, `norm`, `cosine_similarity`. *Merging*: s·B·A is formed and
added, for DoRA normalised and scaled, then the same. *Streaming read*: the sum of the same mapped
bytes as 64-bit integers. Flops of an adapter are the 2·out·in·rank of W0·Aᵀ. They are done in
float64, for float32 would cost the digits of a small ΔM; so float64's matrix multiply is what the
engine can reach, and half of float32's is out of reach here.

## Training

LoRA and DoRA of `wda.adapters` and of peft {peft.__version__} on the same weights, in float32.
A step is a forward and a backward pass, of MiniLM with AdamW's update. A ratio over 1 says that the
first named takes longer. Where peft's LoRA alone takes more than 1/1.4 of peft's DoRA, as with many
tokens, no DoRA can be 1.4 times as fast as peft's. *Bytes kept*: storages that autograd saves.

{tabulated(trained)}

## Growth

| what grows | size | seconds |
| --- | --- | --- |
{grown}

![Time against size](figures/bench_growth.png)
"""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Make the checkpoints, measure, write the page."""
    console = Console(stderr=True)
    folder = Path(tempfile.mkdtemp(prefix="wda-bench-"))
    try:
        with console.status("making checkpoints"):
            base = material.make_base(folder / "base", MATRICES)
            full = [material.make_full(folder / f"ft{i}", base, i) for i in range(CHECKPOINTS)]
            adapters = {
                name: [
                    material.make_adapter(folder / f"{name}{i}", MATRICES, RANK, name == "DoRA", i)
                    for i in range(CHECKPOINTS)
                ]
                for name in ("LoRA", "DoRA")
            }
        with console.status("measuring"):
            rows = dense_rows(base, full) + adapter_rows(base, adapters) + [start_up_row()]
            rows += memory_rows(base, {"dense": full, **adapters})
            table = growth(folder)
            trained = training.rows()
        draw(table, ROOT / "docs" / "figures" / "bench_growth.png")
        text = page(rows, trained, table)
        (ROOT / "docs" / "benchmarks.md").write_text(text, encoding="utf-8")
        console.print(text)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    np.seterr(over="ignore")  # the streaming read's sum may wrap
    main()
