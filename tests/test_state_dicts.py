"""What trainings wrap around a model: the same numbers, with and without."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import moved, pico_weights, save_model
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import wda
from wda.errors import CheckpointError

TUNED = moved(pico_weights(), 0.1, seed=1)


def module_of(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A module whose state dict these tensors are."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for word in path:
            if word not in dict(module.named_children()):
                module.add_module(word, nn.Module())
            module = module.get_submodule(word)
        module.register_parameter(last, nn.Parameter(tensor.clone()))
    return root


def numbers(checkpoint: Path, base: Path) -> pd.DataFrame:
    table = wda.compare(checkpoint, base=base, cache=False, progress=False).table
    return table[["module", "delta_m", "delta_d"]]


@pytest.fixture
def expected(tmp_path: Path, base: Path) -> pd.DataFrame:
    return numbers(save_model(tmp_path / "plain", TUNED), base)


def test_wrapped_modules_are_read_under_their_own_names(
    tmp_path: Path, base: Path, expected: pd.DataFrame
) -> None:
    module = module_of(TUNED)
    layers = module.get_submodule("encoder.layer")
    layers.add_module("1", checkpoint_wrapper(layers.get_submodule("1")))
    layers.add_module("0", torch.compile(layers.get_submodule("0")))  # type: ignore[arg-type]
    wrapped = nn.DataParallel(torch.compile(module))  # type: ignore[arg-type]
    names = wrapped.state_dict()
    assert all(name.startswith("module._orig_mod.") for name in names)
    assert any(".layer.0._orig_mod." in name for name in names)
    fsdp = {f"_fsdp_wrapped_module.{name}": tensor for name, tensor in TUNED.items()}
    inside = {
        f"net.{n.replace('layer.2', 'layer.2._fsdp_wrapped_module')}": t for n, t in TUNED.items()
    }
    for i, tensors in enumerate((names, fsdp, inside)):
        torch.save(tensors, tmp_path / f"{i}.pt")
        pd.testing.assert_frame_equal(numbers(tmp_path / f"{i}.pt", base), expected)
    folder = tmp_path / "safe"
    folder.mkdir()
    save_file(fsdp, folder / "model.safetensors")
    pd.testing.assert_frame_equal(numbers(folder, base), expected)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_tensors_lie_under_a_key_of_the_training(
    key: str, tmp_path: Path, base: Path, expected: pd.DataFrame
) -> None:
    optimiser = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"epoch": 3, "optimizer": optimiser, key: TUNED}, tmp_path / "last.pth")
    pd.testing.assert_frame_equal(numbers(tmp_path / "last.pth", base), expected)


def test_a_run_of_lightnings_checkpoints(
    tmp_path: Path, base: Path, expected: pd.DataFrame
) -> None:
    """Written as Lightning lays them out, not by Lightning itself."""
    run = tmp_path / "mine"
    run.mkdir()
    for step, size in ((20, 0.2), (3, 0.1)):
        state = {f"model.{name}": t for name, t in moved(pico_weights(), size, seed=1).items()}
        content = {"epoch": 1, "global_step": step, "pytorch-lightning_version": "2.5.0"}
        torch.save({**content, "state_dict": state}, run / f"epoch=1-step={step}.ckpt")
    table = wda.compare(run, base=base, progress=False).table
    assert list(dict.fromkeys(table["step"])) == [3, 20]
    first = table[table["step"] == 3].reset_index(drop=True)
    pd.testing.assert_frame_equal(first[["module", "delta_m", "delta_d"]], expected)
    alone = wda.compare(run / "epoch=1-step=20.ckpt", base=base, progress=False).table
    assert set(alone["step"]) == {20}


def test_what_cannot_be_told_is_refused(tmp_path: Path, base: Path) -> None:
    twice = {**TUNED, **{f"module.{name}": tensor for name, tensor in TUNED.items()}}
    torch.save(twice, tmp_path / "twice.pt")
    with pytest.raises(CheckpointError, match="the same tensor several times, wrapped and not"):
        numbers(tmp_path / "twice.pt", base)
    torch.save({"model": [1, 2]}, tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="holds no named tensors.* its keys are model"):
        numbers(tmp_path / "none.pt", base)
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list, expected a dictionary"):
        numbers(tmp_path / "list.pt", base)
