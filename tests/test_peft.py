"""Adapters made by the real peft: the table against float64 arithmetic on peft's merged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import peft
import pytest
import torch
import transformers
from peft.utils import ModulesToSaveWrapper

import wda
from wda.checkpoints import open_checkpoint
from wda.errors import CheckpointError
from wda.naming import layer_index

BERT = transformers.BertConfig(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=40,
    vocab_size=50,
    max_position_embeddings=16,
)
LLAMA = transformers.LlamaConfig(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
    vocab_size=50,
)
GPT2 = transformers.GPT2Config(n_embd=24, n_layer=3, n_head=4, vocab_size=50, n_positions=16)

CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "lora": (BERT, {"target_modules": ["query", "value", "dense"]}, "query,value,output,up,down"),
    "dora": (
        BERT,
        {"target_modules": ["query", "value", "dense"], "use_dora": True},
        "query,value,output,up,down",
    ),
    "rslora": (LLAMA, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}, "query,value"),
    "patterns": (
        LLAMA,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 5},
            "alpha_pattern": {"layers.2.self_attn.q_proj": 11, "down_proj": 3},
        },
        "query,value,down",
    ),
    "dora patterns": (
        LLAMA,
        {
            "target_modules": ["q_proj", "v_proj"],
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 3},
            "alpha_pattern": {"v_proj": 9},
        },
        "query,value",
    ),
    "conv1d": (
        GPT2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        "query,key,value,output,down",
    ),
    "conv1d dora": (
        GPT2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
        "query,key,value,output,down",
    ),
    "modules_to_save": (
        LLAMA,
        {"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]},
        "query,value",
    ),
}


def trained_adapter(config: Any, settings: dict[str, Any], folder: Path) -> tuple[Any, Path]:
    """Save a base and an adapter with trained-looking numbers; give the model, in float64."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if not parameter.requires_grad:
                continue
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "run" / "checkpoint-7")
    return adapted.double(), folder / "run"


def reference(w0: torch.Tensor, wt: torch.Tensor, per: str) -> tuple[float, float]:
    """ΔM and ΔD from their definitions in float64; the updates here are large enough for it."""
    dim = 1 if per == "output" else 0
    m0, mt = w0.norm(dim=dim), wt.norm(dim=dim)
    cos = (w0 * wt).sum(dim=dim) / (m0 * mt)
    return float((mt - m0).abs().mean()), float((1 - cos).mean())


def split_of(weight: torch.Tensor, row: Any, conv1d: bool) -> torch.Tensor:
    weight = weight.T if conv1d else weight
    if row["module"].endswith("c_attn"):
        return weight.chunk(3)[("query", "key", "value").index(row["matrix"])]
    return weight


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("per", ["output", "input"])
@pytest.mark.parametrize("case", CASES)
def test_table_agrees_with_pefts_own_merge(case: str, per: str, tmp_path: Path) -> None:
    config, settings, labels = CASES[case]
    adapted, run = trained_adapter(config, settings, tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").double()
    expected_rows = sum(
        3 if name.endswith("c_attn") else 1
        for name, module in adapted.named_modules()
        if layer_index(name) is not None
        and (hasattr(module, "lora_A") or isinstance(module, ModulesToSaveWrapper))
    )
    merged = adapted.merge_and_unload()
    comparison = wda.compare(
        run, base=tmp_path / "base", matrices=labels.split(","), per=per, progress=False
    )
    assert len(comparison.table) == expected_rows
    assert set(comparison.table["matrix"]) == set(labels.split(","))
    for _, row in comparison.table.iterrows():
        w0, wt = (
            split_of(m.get_submodule(row["module"]).weight.detach(), row, config is GPT2)
            for m in (base, merged)
        )
        assert not torch.equal(w0, wt)
        assert (row["out_features"], row["in_features"]) == tuple(w0.shape)
        got = (row["delta_m"], row["delta_d"])
        assert got == pytest.approx(reference(w0, wt, per), rel=1e-6), row["module"]
    assert set(comparison.table["method"]) == {"dora" if settings.get("use_dora") else "lora"}
    assert set(comparison.table["step"]) == {7}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_scaling_is_pefts(tmp_path: Path) -> None:
    for case in ("rslora", "patterns", "dora patterns"):
        config, settings, _ = CASES[case]
        adapted, run = trained_adapter(config, settings, tmp_path / case)
        checkpoint: Any = open_checkpoint(run / "checkpoint-7")
        for module in checkpoint.required:
            layer = adapted.base_model.model.get_submodule(module)
            assert checkpoint.forms[module].scale == pytest.approx(
                layer.scaling["default"], rel=1e-12
            )


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_models_own_state_dict_names_the_adapter(method: str, tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj", "v_proj"], "use_dora": method == "dora"}
    model, run = trained_adapter(LLAMA, settings, tmp_path)
    saved = run / "checkpoint-7"
    expected = wda.compare(run, base=tmp_path / "base", cache=False, progress=False).table
    own = {k: t.float() for k, t in model.state_dict().items() if "lora_" in k}
    assert any(".lora_A.default.weight" in name for name in own)
    (saved / "adapter_model.safetensors").unlink()
    torch.save(own, saved / "adapter_model.bin")
    found = wda.compare(run, base=tmp_path / "base", cache=False, progress=False).table
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    second = {name.replace(".default", ".other"): tensor for name, tensor in own.items()}
    torch.save(own | second, saved / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="holds several adapters of model.layers.0"):
        wda.compare(run, base=tmp_path / "base", progress=False)
