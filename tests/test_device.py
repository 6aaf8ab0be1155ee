"""Computing elsewhere than on the processor: the same numbers, to rounding."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import wda_command

import wda
from wda import kernels
from wda.engine import usable_device
from wda.errors import DeviceError


def close(left: pd.DataFrame, right: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(left, right, check_exact=False, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("per", ["output", "input"])
def test_what_a_device_computes_without_kernels_is_the_same(
    per: str, runs: dict[str, Path], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"base": base, "per": per, "cache": False, "progress": False}
    folders = list(runs.values())
    expected = wda.compare(folders, **options).table  # type: ignore[arg-type]
    monkeypatch.setattr(kernels, "takes", lambda _rows: False)
    close(wda.compare(folders, **options).table, expected)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("per", ["output", "input"])
def test_cuda_gives_the_same(per: str, runs: dict[str, Path], base: Path) -> None:
    options = {"base": base, "per": per, "cache": False, "progress": False}
    folders = list(runs.values())
    expected = wda.compare(folders, **options).table  # type: ignore[arg-type]
    close(wda.compare(folders, device="cuda", **options).table, expected)  # type: ignore[arg-type]


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_device("cpu") == "cpu"
    for device in ("mps", "cuda:x", "gpu", ""):
        with pytest.raises(DeviceError, match="give cpu, cuda or cuda:N"):
            usable_device(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert usable_device("cuda") == "cuda"
    with pytest.raises(DeviceError, match="cuda:1 is not there.* it finds 1"):
        usable_device("cuda:1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_command_line_says_so(tmp_path: Path, runs: dict[str, Path], base: Path) -> None:
    done = wda_command("compare", runs["ft"], "--base", base, "--device", "cuda", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "device: cuda is not there" in done.stderr
