"""Layouts of other trainers: what their fixtures cannot show."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import types
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as distributed

import wda
from wda.checkpoints import Given, open_base
from wda.errors import CheckpointError
from wda.naming import find_matrices, layer_index
from wda.updates import merged

FIXTURES = Path(__file__).parent / "fixtures"
EVERYTHING = ["re:.*"]


def compared(base: Path, checkpoint: Path, **given: object) -> pd.DataFrame:
    return wda.compare(
        checkpoint,
        base=base,
        matrices=EVERYTHING,
        given=Given(**given),  # type: ignore[arg-type]
        cache=False,
        progress=False,
    ).table


def of(name: str) -> tuple[Path, Path]:
    folder = FIXTURES / name
    return folder / "base", next(p for p in folder.iterdir() if p.stem == "checkpoint")


def measures(table: pd.DataFrame) -> dict[tuple[str, str], tuple[float, float]]:
    rows = table.itertuples()
    return {(str(r.module), str(r.matrix)): (r.delta_m, r.delta_d) for r in rows}  # type: ignore[misc]


# torchtune: the export in PEFT's layout is wrong for q and k, and is read right all the same.


@pytest.mark.parametrize(
    "name", ["torchtune-llama-dora", "torchtune-gemma-lora", "torchtune-qwen2-dora"]
)
def test_the_export_says_the_same_as_the_adapter_itself(name: str, tmp_path: Path) -> None:
    base, checkpoint = of(name)
    own = measures(compared(base, checkpoint))
    shutil.copytree(checkpoint, tmp_path / "export")
    (tmp_path / "export" / "adapter_model.pt").unlink()
    exported = measures(compared(base, tmp_path / "export"))
    assert exported.keys() == own.keys()
    for module, both in own.items():
        assert exported[module] == pytest.approx(both, rel=1e-9), module


def test_an_export_needs_to_know_its_model(tmp_path: Path) -> None:
    base, checkpoint = of("torchtune-llama-dora")
    shutil.copytree(checkpoint, tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    with pytest.raises(CheckpointError, match="says 'phi3' and no size; copy the base's here"):
        compared(base, tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="lora_alpha.*--alpha"):
        compared(base, tmp_path / "a")


# What is stored nowhere is asked for.


@pytest.mark.parametrize("name", ["loralib-encoder", "fsdp-qlora-lora", "nemo-dora"])
def test_alpha_is_asked_for(name: str) -> None:
    with pytest.raises(CheckpointError, match="stores no α.*--alpha"):
        compared(*of(name))


def test_the_parts_that_have_factors_are_asked_for() -> None:
    with pytest.raises(CheckpointError, match="factors for 2 of query.*--enabled.*given: nothing"):
        compared(*of("loralib-gpt2"), alpha=7)
    with pytest.raises(CheckpointError, match="given: query"):
        compared(*of("loralib-gpt2"), alpha=7, enabled=("query",))


def test_other_parts_are_other_numbers() -> None:
    right = measures(compared(*of("loralib-gpt2"), alpha=7, enabled=("query", "value")))
    wrong = measures(compared(*of("loralib-gpt2"), alpha=7, enabled=("key", "value")))
    module = "transformer.h.0.attn.c_attn"
    assert right[module, "key"] == (0, 0)
    assert wrong[module, "query"] == (0, 0)
    assert right[module, "value"] == wrong[module, "value"]


def test_a_weight_that_is_neither_w0_nor_merged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither the base's nor has the factors"):
        compared(*of("loralib-merged"), alpha=9)
    base, file = of("loralib-whole")
    held = torch.load(file, weights_only=True)
    held["model_state_dict"]["encoder.layer.0.attention.self.query.weight"] += 0.01
    torch.save(held, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="neither the base's"):
        compared(base, tmp_path / "model.pt", alpha=7)


def test_factors_written_by_hand_are_refused(tmp_path: Path) -> None:
    base, file = of("loralib-encoder")
    held = torch.load(file, weights_only=True)
    held["encoder.layer.0.attention.self.query.m"] = torch.ones(1, 12)
    torch.save(held, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="written by hand.*compare the merged model"):
        compared(base, tmp_path / "model.pt", alpha=7)


# LitGPT


def split_by_litgpt(fused: torch.Tensor, interleaved: bool) -> dict[str, torch.Tensor]:
    """Cut 4 heads and 2 groups of size 6 as LitGPT's attention does."""
    if not interleaved:
        return dict(zip(("query", "key", "value"), fused.split([24, 12, 12]), strict=True))
    groups = fused.view(2, 4, 6, -1)
    return {
        "query": groups[:, :2].flatten(0, 2),
        "key": groups[:, 2].flatten(0, 1),
        "value": groups[:, 3].flatten(0, 1),
    }


@pytest.mark.parametrize(
    "name", ["litgpt-lora-qkv", "litgpt-interleaved-qv", "litgpt-interleaved-qkv"]
)
def test_the_parts_of_its_projection_are_told_apart(name: str) -> None:
    base, checkpoint = of(name)
    truth = load_file(FIXTURES / name / "truth.safetensors")
    before = torch.load(base / "lit_model.pth", weights_only=True)
    measured = measures(compared(base, checkpoint))
    for module in {module for module, label in measured if label == "query"}:
        weights = before[f"{module}.weight"].double(), truth[f"{module}.weight"].double()
        w0, wt = (split_by_litgpt(w, "interleaved" in name) for w in weights)
        for label in w0:
            true = wda.decompose(w0[label], wt[label])
            assert measured[module, label] == pytest.approx((true.delta_m, true.delta_d), rel=1e-6)
    assert {label for _, label in measured} >= {"query", "key", "value"}


def test_its_settings_are_asked_for(tmp_path: Path) -> None:
    base, checkpoint = of("litgpt-lora")
    for name in ("hyperparameters.yaml", "model_config.yaml"):
        folder = tmp_path / name.removesuffix(".yaml")
        shutil.copytree(checkpoint, folder)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"no {name} beside lit_model.pth.lora"):
            compared(base, folder)
    settings = tmp_path / "c" / "hyperparameters.yaml"
    shutil.copytree(checkpoint, tmp_path / "c")
    settings.write_text(settings.read_text().replace("lora_value: true", "lora_value: false"))
    with pytest.raises(CheckpointError, match="36 rows in lora_B, which are not those of query"):
        compared(base, tmp_path / "c")


# NeMo, fsdp_qlora, the paper's image and video code


def test_nemo_against_megatrons_names_is_left_fused(tmp_path: Path) -> None:
    _, file = of("nemo-lora")
    held = torch.load(file, weights_only=True)
    weights = {}
    for name, tensor in held.items():
        if name.endswith("linear_in.weight"):
            module = name.removeprefix("module.").removesuffix(".adapter.linear_in.weight")
            out = held[name.replace("linear_in", "linear_out")].shape[0]
            weights[f"{module}.weight"] = torch.randn(out, tensor.shape[1])
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    labels = {label for _, label in measures(compared(tmp_path / "base", file, alpha=7))}
    assert {"linear_qkv", "linear_fc1", "linear_proj", "linear_fc2"} == labels


def test_nemo_needs_the_heads_of_the_base(tmp_path: Path) -> None:
    base, file = of("nemo-lora")
    shutil.copytree(base, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"head_dim": 3}))
    with pytest.raises(CheckpointError, match="by the heads in the base's config.json"):
        compared(tmp_path / "base", file, alpha=7)


@pytest.mark.parametrize(
    ("name", "ending", "message"),
    [
        ("fsdp-qlora-dora", ".magnitude", "magnitude_layer.magnitude is missing"),
        ("vl-bart-dora", ".weight_m", "weight_m is missing"),
        ("vl-bart-dora", ".weight_v", "weight_v, W0 itself, is missing"),
    ],
)
def test_nothing_stands_in_for_what_is_lost(
    name: str, ending: str, message: str, tmp_path: Path
) -> None:
    base, path = of(name)
    file = path if path.is_file() else path / "model_state_dict.safetensors"
    safe = file.suffix == ".safetensors"
    held = load_file(file) if safe else torch.load(file, weights_only=True)
    del held[next(name for name in held if name.endswith(ending))]
    target = tmp_path / file.name
    save_file(held, target) if safe else torch.save(held, target)
    with pytest.raises(CheckpointError, match=message):
        compared(base, target)


def test_alpha_changes_nothing_where_the_code_never_used_it() -> None:
    for name in ("fsdp-qlora-dora", "vl-bart-dora"):
        assert measures(compared(*of(name))) == measures(compared(*of(name), alpha=100))


def test_vl_bart_starts_from_the_w0_it_holds(tmp_path: Path) -> None:
    base, file = of("vl-bart-dora")
    truth = load_file(file.parent / "truth.safetensors")
    rounded = {n: t.bfloat16().float() for n, t in load_file(base / "model.safetensors").items()}
    save_file(rounded, tmp_path / "model.safetensors")
    measured = measures(compared(tmp_path, file))
    module = "model.encoder.layers.0.self_attn.q_proj"
    true = wda.decompose(rounded[f"{module}.weight"], truth[f"{module}.weight"])
    assert measured[module, "query"] == pytest.approx((true.delta_m, true.delta_d), rel=1e-6)


# MLX-LM


def test_mlx_says_what_else_was_trained(tmp_path: Path) -> None:
    base, checkpoint = of("mlx-full")
    table = compared(base, checkpoint)
    assert set(table["layer"]) == {1}
    assert set(table["method"]) == {"ft"}


# NeMo's folders are distributed checkpoints, which Megatron describes by a class of its own.


@pytest.mark.parametrize("name", ["nemo-lora", "nemo-dora"])
@pytest.mark.parametrize("inner", ["", "weights"])
def test_nemos_folder_says_the_same_as_the_file_made_of_it(
    name: str, inner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, file = of(name)
    alpha = json.loads((FIXTURES / name / "about.json").read_text())["options"]["alpha"]
    held: dict[str, object] = torch.load(file, weights_only=True)
    held["module.decoder.layers.self_attention.core_attention._extra_state/shard_0_2"] = b"state"
    folder = tmp_path / "run" / inner
    distributed.save(held, checkpoint_id=folder, no_dist=True)
    described = pickle.loads((folder / ".metadata").read_bytes())
    place = "megatron.core.dist_checkpointing.strategies.torch"

    class MCoreMetadata(type(described)):  # type: ignore[misc]
        __module__, __qualname__ = place, "MCoreMetadata"

    words = place.split(".")
    for count in range(1, len(words) + 1):
        stub = types.ModuleType(".".join(words[:count]))
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    stub.MCoreMetadata = MCoreMetadata  # type: ignore[attr-defined]
    described.__class__ = MCoreMetadata
    described.mcore_data = {}
    (folder / ".metadata").write_bytes(pickle.dumps(described))
    (tmp_path / "run" / "context").mkdir()
    own, found = measures(compared(base, file, alpha=alpha)), tmp_path / "run"
    assert measures(compared(base, found, alpha=alpha)) == own
    with pytest.raises(CheckpointError, match="NeMo stores no α"):
        compared(base, found)


# Whole models in a trainer's own names, against Hugging Face's.


def test_whole_models_against_fused_projections(tmp_path: Path) -> None:
    """LitGPT's of a Phi-3, and of before 0.5.5, say the same as its Llama of today."""
    base, checkpoint = of("litgpt-full-hf")
    same = measures(compared(base, checkpoint))
    # A Phi-3 of Hugging Face has queries, keys and values in one, and gate and up.
    tensors, fused = load_file(base / "model.safetensors"), tmp_path / "fused"
    for layer in range(2):
        path = f"model.layers.{layer}"
        for name, parts in {
            "self_attn.qkv_proj": [f"self_attn.{x}_proj" for x in "qkv"],
            "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
        }.items():
            held = [tensors.pop(f"{path}.{part}.weight") for part in parts]
            tensors[f"{path}.{name}.weight"] = torch.cat(held)
    fused.mkdir()
    save_file(tensors, fused / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (fused / "config.json").write_text(json.dumps({**config, "model_type": "phi3", "head_dim": 6}))
    by_label = {(layer_index(module), label): both for (module, label), both in same.items()}
    of_fused = measures(compared(fused, checkpoint))
    assert len(of_fused) == len(same)
    for (module, label), both in of_fused.items():
        assert by_label[layer_index(module), label] == pytest.approx(both), label
    # Before 0.5.5 the rows of two query heads, a key and a value lay together by group.
    old = tmp_path / "old"
    shutil.copytree(checkpoint, old)
    held = torch.load(old / "lit_model.pth", weights_only=True)["model"]
    for layer in range(2):
        q, k, v = held.pop(f"transformer.h.{layer}.attn.qkv.weight").split([24, 12, 12])
        groups = zip(q.view(2, 12, -1), k.view(2, 6, -1), v.view(2, 6, -1), strict=True)
        together = torch.cat([torch.cat(of_group) for of_group in groups])
        held[f"transformer.h.{layer}.attn.attn.weight"] = together
    torch.save({"model": held}, old / "lit_model.pth")
    for where, expected in ((base, same), (fused, of_fused)):
        found = measures(compared(where, old))
        assert found.keys() == expected.keys()
        assert all(found[name] == pytest.approx(expected[name]) for name in found)


def test_torchtunes_own_names_against_its_own(tmp_path: Path) -> None:
    """Where the base is in torchtune's order too, no row is moved."""
    base, checkpoint = of("torchtune-llama-full")
    name = "model-00001-of-00001.bin"
    held = torch.load(checkpoint / name, weights_only=True)
    (tmp_path / "own").mkdir()
    torch.save({n: t + 0.1 if t.ndim > 1 else t for n, t in held.items()}, tmp_path / "own" / name)
    for row in compared(tmp_path / "own", checkpoint).itertuples():
        wt = held[f"{row.module}.weight"]
        assert row.delta_d == pytest.approx(wda.decompose(wt + 0.1, wt).delta_d, rel=1e-5)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    (other / "config.json").write_text('{"model_type": "mllama"}')
    with pytest.raises(CheckpointError, match="says 'mllama' and no size"):
        compared(other, checkpoint)
    # What does not turn with the positions has one order of rows.
    others = "value,output,gate,up,down"
    assert len(wda.compare(checkpoint, other, others, cache=False, progress=False).table) == 10


@pytest.mark.parametrize("name", ["torchtune-llama-full", "torchtune-phi3-full", "litgpt-full-hf"])
def test_a_worker_reads_rows_of_whole_models_alike(name: str) -> None:
    """Where a checkpoint is opened again, and never asked for its names."""
    base, checkpoint = map(open_base, of(name))
    truth = load_file(FIXTURES / name / "truth.safetensors")
    there = pickle.loads(pickle.dumps(checkpoint))
    matrices = {m.module: m for m in find_matrices(base.tensors.shapes, config=base.config)}
    for own, of_base in checkpoint.names_in(base).items():
        if (matrix := matrices.get(of_base)) is not None:
            wt = merged(
                there.update(own, matrix, base, slice(3, 7)), torch.zeros(4, matrix.shape[1])
            )
            assert torch.equal(wt, matrix.take(truth[f"{of_base}.weight"])[3:7].double())
