"""Adapters in the layout of the paper's own code, which is no package: written here by its keys."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import PICO_LAYERS, PICO_SHAPES, moved, pico_weights, save_model
from safetensors.torch import save_file

import wda
from wda.errors import CheckpointError

RANK, ALPHA = 3, 5
CONFIG = {
    "peft_type": "DORA",
    "r": RANK,
    "lora_alpha": ALPHA,
    "target_modules": ["query"],
    "Wdecompose_target_modules": ["value"],
    "dora_simple": True,
    "base_model_name_or_path": None,
}


def adapter(name: str = "", seed: int = 0) -> dict[str, torch.Tensor]:
    """Factors for every query, a magnitude for every query and value."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(PICO_LAYERS):
        for kind in ("query", "value"):
            out, features = PICO_SHAPES[kind]
            module = f"encoder.layer.{layer}.attention.self.{kind}"
            path, norm = (
                f"base_model.model.{module}",
                pico_weights()[f"{module}.weight"].norm(dim=1),
            )
            if kind == "query":
                tensors[f"{path}.lora_A{name}.weight"] = torch.randn(
                    RANK, features, generator=generator
                )
                tensors[f"{path}.lora_B{name}.weight"] = torch.randn(out, RANK, generator=generator)
            m = norm * (1 + 0.05 * torch.randn(out, generator=generator))
            tensors[f"{path}.weight_m_wdecomp{name}.weight"] = m[:, None]
    return tensors


def merged(tensors: dict[str, torch.Tensor], name: str = "") -> dict[str, torch.Tensor]:
    """The weights as the code's own layer has them, in float64."""
    weights = {key: tensor.double() for key, tensor in pico_weights().items()}
    for layer in range(PICO_LAYERS):
        for kind in ("query", "value"):
            module = f"encoder.layer.{layer}.attention.self.{kind}"
            path = f"base_model.model.{module}"
            v = weights[f"{module}.weight"]
            if kind == "query":
                a, b = (tensors[f"{path}.lora_{x}{name}.weight"].double() for x in "AB")
                v = v + ALPHA / RANK * b @ a
            m = tensors[f"{path}.weight_m_wdecomp{name}.weight"].double()
            weights[f"{module}.weight"] = m / torch.linalg.norm(v, dim=1)[:, None] * v
    return weights


def check(found: Path, tensors: dict[str, torch.Tensor], base: Path, name: str = "") -> None:
    table = wda.compare(found, base=base, cache=False, progress=False).table
    assert set(table["method"]) == {"dora"}
    w0, wt = pico_weights(), merged(tensors, name)
    assert len(table) == 2 * PICO_LAYERS
    for row in table.itertuples():
        true = wda.decompose(w0[f"{row.module}.weight"], wt[f"{row.module}.weight"])
        assert row.delta_m == pytest.approx(true.delta_m, rel=1e-6)
        assert row.delta_d == pytest.approx(true.delta_d, rel=1e-6, abs=1e-15)
    # Where the magnitude alone is trained, nothing turns.
    assert (table.loc[table["matrix"] == "value", "delta_d"] == 0).all()
    assert (table.loc[table["matrix"] == "value", "delta_m"] > 0.01).all()


def test_commonsense_reasoning(tmp_path: Path, base: Path) -> None:
    tensors = adapter()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    check(tmp_path, tensors, base)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_checkpoints_of_a_training(file: str, tmp_path: Path, base: Path) -> None:
    """The adapter alone under a whole model's name, its configuration in the folder above."""
    run = tmp_path / "run"
    for step in (10, 20):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        tensors = adapter(seed=step)
        if file.endswith(".bin"):
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file)
    with pytest.raises(CheckpointError, match="no adapter_config.json with lora_alpha here or"):
        wda.compare(run, base=base, progress=False)
    (run / "adapter_config.json").write_text(json.dumps(CONFIG))
    check(run / "checkpoint-20", adapter(seed=20), base)
    assert set(wda.compare(run, base=base, progress=False).table["step"]) == {10, 20}


def test_magnitudes_that_llava_puts_elsewhere(tmp_path: Path, base: Path) -> None:
    tensors = adapter(".default")
    magnitudes = {k: t for k, t in tensors.items() if "weight_m_wdecomp" in k}
    factors = {k: t for k, t in tensors.items() if k not in magnitudes}
    torch.save(factors, tmp_path / "adapter_model.bin")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match="weight_m_wdecomp is missing .*non_lora_trainables"):
        wda.compare(tmp_path, base=base, progress=False)
    others = {"base_model.model.mm_projector.weight": torch.ones(4, 4)}
    torch.save({**others, **magnitudes}, tmp_path / "non_lora_trainables.bin")
    check(tmp_path, tensors, base, ".default")


def test_other_adapters_and_models_are_not_taken_for_it(
    tmp_path: Path, base: Path, runs: dict[str, Path]
) -> None:
    bare = save_model(tmp_path / "bare", moved(pico_weights(), 0.1, seed=1))
    (bare / "config.json").unlink()
    table = wda.compare([bare, runs["dora"]], base=base, progress=False)
    layouts = {c["run"]: c["layout"] for c in table.provenance["checkpoints"]}  # type: ignore[attr-defined]
    assert layouts == {"bare": "whole model", "dora": "PEFT adapter"}
    assert isinstance(table.table, pd.DataFrame)
