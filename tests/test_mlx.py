"""Adapters in MLX-LM's layout, written here by its keys; the fixtures hold MLX-LM's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import PICO_LAYERS, PICO_SHAPES, pico_weights
from safetensors.torch import save_file
from servers import Files, serving

import wda
from wda.errors import CheckpointError

RANK, SCALE = 3, 2.5


def adapter(
    folder: Path, method: str, seed: int = 0, file: str = "adapters.safetensors"
) -> dict[str, torch.Tensor]:
    """Write an adapter of query and value, and give the weights it makes, in float64."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors, weights = {}, {}
    for layer in range(PICO_LAYERS):
        for kind in ("query", "value"):
            out, features = PICO_SHAPES[kind]
            module = f"encoder.layer.{layer}.attention.self.{kind}"
            w0 = pico_weights()[f"{module}.weight"].double()
            a = torch.randn(features, RANK, generator=generator)
            b = 0.1 * torch.randn(RANK, out, generator=generator)
            wt = w0 + (SCALE * b.double().T) @ a.double().T
            tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
            if method == "dora":
                m = w0.norm(dim=1).float() * (1 + 0.05 * torch.randn(out, generator=generator))
                tensors[f"{module}.m"] = m
                wt = (m.double() / torch.linalg.norm(wt, dim=1))[:, None] * wt
            weights[module] = wt
    save_file(tensors, folder / file)
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    config = {"fine_tune_type": method, "lora_parameters": parameters, "num_layers": 3}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return weights


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("per", ["output", "input"])
def test_factors_lie_the_other_way_round(method: str, per: str, tmp_path: Path, base: Path) -> None:
    weights = adapter(tmp_path / "a", method)
    table = wda.compare(tmp_path / "a", base=base, per=per, progress=False).table  # type: ignore[arg-type]
    assert set(table["method"]) == {method}
    assert len(table) == 6
    for row in table.itertuples():
        w0 = pico_weights()[f"{row.module}.weight"]
        true = wda.decompose(w0, weights[str(row.module)], per)  # type: ignore[arg-type]
        assert row.delta_m == pytest.approx(true.delta_m, rel=1e-6)
        assert row.delta_d == pytest.approx(true.delta_d, rel=1e-6)


def test_steps_are_files_of_one_folder(tmp_path: Path, base: Path) -> None:
    run = tmp_path / "run"
    for step in (200, 100):
        adapter(run, "dora", seed=step, file=f"{step:07d}_adapters.safetensors")
    adapter(run, "dora", seed=200)
    table = wda.compare(run, base=base, progress=False).table
    assert list(dict.fromkeys(table["step"])) == [100, 200]
    last = adapter(tmp_path / "again", "dora", seed=200)
    assert last.keys() == set(table["module"])
    one = wda.compare(tmp_path / "again", base=base, progress=False).table
    of_200 = table[table["step"] == 200]
    assert of_200["delta_m"].tolist() == one["delta_m"].tolist()


def test_it_is_read_from_afar(tmp_path: Path, base: Path) -> None:
    adapter(tmp_path / "site" / "a", "dora")
    near = wda.compare(tmp_path / "site" / "a", base=base, progress=False).table
    with serving(Files, tmp_path / "site") as (_, address):
        far = wda.compare(f"{address}/a", base=base, progress=False).table
    assert far["delta_m"].tolist() == near["delta_m"].tolist()


def test_what_is_refused(tmp_path: Path, base: Path) -> None:
    adapter(tmp_path, "lora")
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for change, message in (
        ({"fine_tune_type": "dora"}, "fine_tune_type is dora but m is missing"),
        ({"fine_tune_type": "ia3"}, "fine_tune_type 'ia3' is not read yet"),
        ({"lora_parameters": {"rank": RANK}}, "lora_parameters need scale"),
        ({"lora_parameters": {"rank": RANK, "scale": 2, "alpha": 16}}, "and no alpha"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            wda.compare(tmp_path, base=base, progress=False)
