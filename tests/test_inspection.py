"""wda inspect: what a checkpoint is, told without reading a tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import pico_weights, save_model, save_pico_adapter, wda_command
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from servers import Files, serving
from test_fixtures import FIXTURES

from wda.checkpoints import Given
from wda.errors import WdaError
from wda.inspection import Held, inspect

# The fixtures that are whole models, by how their names begin.
WHOLE = ("awq", "dcp", "fp", "fsdp_", "gguf", "gptq", "int8", "lightning", "litgpt-full", "mlx_")
WHOLE += ("nf4", "packed", "torchtune-llama-full", "torchtune-phi3-full", "zero")
ADAPTERS = [fixture for fixture in FIXTURES if not fixture.name.startswith(WHOLE)]


def test_a_whole_model(base: Path) -> None:
    (found,) = inspect(str(base))
    assert (found.layout, found.method, found.step) == ("whole model", "ft", None)
    assert len(found.matrices) == 10
    assert found.matrices[0] == Held(
        "embeddings.word_embeddings", "word_embeddings", None, (40, 12), "F32", "the weight itself"
    )
    assert found.files == {"model.safetensors": (base / "model.safetensors").stat().st_size}


def test_adapters_tell_rank_and_scaling(runs: dict[str, Path], base: Path) -> None:
    found = inspect(str(runs["dora"]))
    assert [one.step for one in found] == [9, 10, 100]
    last = found[-1]
    assert (last.layout, last.method, last.base) == ("PEFT adapter", "dora", str(base))
    query = last.matrices[0]
    assert query.shape == (10, 12)
    assert (query.rank, query.update) == (3, "factors and magnitude")
    assert query.scaling == pytest.approx(5 / 3)
    assert [held.layer for held in last.matrices] == [0, 0, 1, 1, 2, 2]


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    save_pico_adapter(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.x.lora_other": torch.ones(2)}, file)
    (found,) = inspect(str(tmp_path / "a"))
    assert found.unread == ("base_model.model.x.lora_other",)


def put_into(file: Path, more: dict[str, torch.Tensor]) -> None:
    """Add tensors to a file, whose others and whose header stay as they are."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as held:
            save_file({**load_file(file), **more}, file, held.metadata())
        return
    held = torch.load(file, weights_only=True)
    of_model = next((held[key] for key in ("model", "model_state_dict") if key in held), held)
    of_model.update(more)
    torch.save(held, file)


@pytest.mark.parametrize("fixture", ADAPTERS, ids=lambda path: path.name)
def test_whatever_is_trained_beside_an_adapter_is_named(fixture: Path, tmp_path: Path) -> None:
    """No layout takes a bias, a norm or a head for something that needs no word."""
    said = json.loads((fixture / "about.json").read_text()).get("options", {})
    given = Given(**{**said, "enabled": tuple(said["enabled"]) if "enabled" in said else None})
    shutil.copytree(fixture, tmp_path / "copy")
    (place,) = (path for path in (tmp_path / "copy").iterdir() if path.stem == "checkpoint")
    (before,) = inspect(str(place), given)
    wrapped = any(word in before.layout for word in ("PEFT", "paper's code"))
    prefix = "base_model.model." if wrapped else ""
    more = {
        f"{prefix}beside.projection.bias": torch.ones(3),
        f"{prefix}beside.norm.weight": torch.ones(3),
        f"{prefix}beside.head.weight": torch.ones(3, 5),
    }
    put_into(place if place.is_file() else place / next(iter(before.files)), more)
    (after,) = inspect(str(place), given)
    named = set(after.unread) - set(before.unread)
    whole = {held.module for held in set(after.matrices) - set(before.matrices)}
    assert len(named) >= 2, "both vectors at least"
    assert named | {f"{prefix}{module}.weight" for module in whole} >= set(more)


def test_no_tensor_travels(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "site" / "far", pico_weights())
    with serving(Files, tmp_path / "site") as (handler, address):
        (far,) = inspect(f"{address}/far")
        (near,) = inspect(str(folder))
        assert far.matrices == near.matrices
        assert sum(handler.served.values()) < 3000


def test_command_line(tmp_path: Path, runs: dict[str, Path]) -> None:
    done = wda_command("inspect", runs["lora"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for fact in (
        "layout    PEFT adapter, told by adapter_config.json",
        "method    lora",
        "steps     9, 10, 100",
        "not read  nothing",
    ):
        assert fact in done.stdout
    (query,) = (line for line in done.stdout.splitlines() if line.startswith("query"))
    assert query.split() == [
        "query",
        "10×12",
        "F32",
        "factors",
        "3",
        "1.66667",
        "3",
        "0",
        "to",
        "2",
    ]
    done = wda_command("inspect", runs["lora"], "--json", cwd=tmp_path)
    assert [one["step"] for one in json.loads(done.stdout)] == [9, 10, 100]
    done = wda_command("inspect", tmp_path / "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    with pytest.raises(WdaError):
        inspect(str(tmp_path / "nowhere"))
