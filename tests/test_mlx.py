"""Adapters in MLX-LM's layout, written here by its keys; the fixtures hold MLX-LM's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import PICO_LAYERS, PICO_SHAPES, pico_weights
from safetensors.torch import load_file, save_file
from servers import Files, serving

import wda
from wda.checkpoints import open_base
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


EXPERTS = Path(__file__).parent / "fixtures" / "mlx-experts"
KINDS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
BITS, GROUP = 8, 4


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put a Mixtral's experts into one tensor, as MLX-LM does on loading and saves them."""
    found = {name: t for name, t in tensors.items() if ".experts." not in name}
    for layer in range(2):
        path = f"model.layers.{layer}.block_sparse_moe"
        for word, kind in KINDS.items():
            experts = [tensors[f"{path}.experts.{e}.{word}.weight"] for e in range(3)]
            found[f"{path}.switch_mlp.{kind}.weight"] = torch.stack(experts)
    return found


def compared(base: Path) -> wda.Comparison:
    wanted = "re:experts"
    return wda.compare(
        EXPERTS / "checkpoint", base, wanted, cache=False, progress=False, max_memory=1 << 20
    )


def test_experts_that_the_base_stacks(tmp_path: Path) -> None:
    plain = load_file(EXPERTS / "base" / "model.safetensors")
    (tmp_path / "base").mkdir()
    save_file(stacked(plain), tmp_path / "base" / "model.safetensors")
    table = compared(tmp_path / "base").table
    assert len(table) == 18
    assert table.equals(compared(EXPERTS / "base").table)


def test_experts_that_the_base_stacks_and_packs(tmp_path: Path) -> None:
    """Each expert's weights are what its numbers, scales and biases mean."""
    plain = load_file(EXPERTS / "base" / "model.safetensors")
    packed, meant = stacked(plain), dict(plain)
    for name in [n for n in packed if ".switch_mlp." in n]:
        weight = packed.pop(name)
        groups = weight.unflatten(-1, (-1, GROUP))
        low, high = groups.amin(-1), groups.amax(-1)
        scales, path = (high - low) / 255, name.removesuffix(".weight")
        numbers = ((groups - low[..., None]) / scales[..., None]).round()
        dense = (numbers * scales[..., None] + low[..., None]).flatten(-2)
        packed[f"{path}.weight"] = numbers.flatten(-2).to(torch.uint8).view(torch.uint32)
        packed |= {f"{path}.scales": scales, f"{path}.biases": low}
        word = next(w for w, kind in KINDS.items() if path.endswith(kind))
        for expert in range(3):
            apart = path.rpartition(".switch_mlp.")[0]
            meant[f"{apart}.experts.{expert}.{word}.weight"] = dense[expert].contiguous()
    for folder, tensors in (("packed", packed), ("meant", meant)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    config = {"quantization": {"group_size": GROUP, "bits": BITS}}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    found, expected = compared(tmp_path / "packed").table, compared(tmp_path / "meant").table
    assert len(found) == 18
    assert set(found["method"]) == {"qlora"}
    assert found["module"].tolist() == expected["module"].tolist()
    for measure in ("delta_m", "delta_d"):
        assert found[measure].tolist() == pytest.approx(expected[measure].tolist(), rel=1e-12)
    checkpoint = open_base(tmp_path / "packed")
    assert not any("switch_mlp" in name for name in checkpoint.tensors)
    weight = checkpoint.tensors.read("model.layers.0.block_sparse_moe.experts.2.w1.weight")
    assert torch.equal(weight, meant["model.layers.0.block_sparse_moe.experts.2.w1.weight"])
