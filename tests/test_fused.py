"""Fused projections: what each part is, shown by what the model does with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model
from torch import nn
from transformers import AutoConfig, AutoModel

import wda
from wda.naming import find_matrices

ATTENTION: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("layers.0.self_attn", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "modernbert": ("layers.0.attn", {"pad_token_id": 0}),
    "mpt": ("blocks.0.attn", {"d_model": 24, "n_heads": 4, "n_layers": 1}),
    "dbrx": (
        "blocks.0.norm_attn_norm.attn",
        {
            "d_model": 24,
            "n_heads": 4,
            "n_layers": 1,
            "max_seq_len": 32,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 100.0},
            "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 2, "moe_top_k": 1},
        },
    ),
    "gpt_bigcode": ("h.0.attn", {"n_embd": 24, "n_head": 4, "n_layer": 1, "multi_query": True}),
    "gpt_bigcode, a key for each head": (
        "h.0.attn",
        {"n_embd": 24, "n_head": 4, "n_layer": 1, "multi_query": False},
    ),
    "gpt_neox": ("layers.0.attention", {"rotary_pct": 0.5}),
    "bloom": ("h.0.self_attention", {"hidden_size": 24, "n_head": 4, "n_layer": 1}),
    "persimmon": ("layers.0.self_attn", {"hidden_size": 32, "qk_layernorm": False}),
    "falcon": ("h.0.self_attention", {"multi_query": True, "alibi": False}),
    "falcon, a key for each head": ("h.0.self_attention", {"multi_query": False, "alibi": True}),
    "falcon, groups": (
        "h.0.self_attention",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    ),
    "codegen": ("h.0.attn", {"n_embd": 32, "n_head": 8, "n_layer": 1, "rotary_dim": 4}),
}
COMMON = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "vocab_size": 50,
}


def tiny(kind: str, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A small random model, whose query and key heads are many enough to matter."""
    own_words = {"d_model", "n_embd"} & set(options)
    common = {"vocab_size": 50} if own_words else COMMON
    config = AutoConfig.for_model(kind, **{**common, **options})
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation="eager").eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model, json.loads(config.to_json_string())


def output_of(model: nn.Module, name: str) -> torch.Tensor:
    """What a module gives for some tokens."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda _m, _a, out: seen.append(out))
    model(input_ids=torch.arange(2, 9)[None])
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", ATTENTION)
def test_query_key_and_value_are_what_attention_makes_of_them(kind: str) -> None:
    place, options = ATTENTION[kind]
    model, config = tiny(kind.partition(",")[0], options)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {m.label: m for m in find_matrices(shapes, config=config) if m.module.startswith(place)}
    assert {"query", "key", "value"} <= set(found)
    (weight,) = {found[label].module for label in ("query", "key", "value")}
    stored = model.get_submodule(weight).weight
    if (bias := getattr(model.get_submodule(weight), "bias", None)) is not None:
        bias.zero_()
    original = stored.clone()

    def with_changes(**sizes: float) -> torch.Tensor:
        stored.copy_(original)
        for label, size in sizes.items():
            for some in found[label].rows_of_stored():
                stored[some] *= size
        return output_of(model, place)

    whole = with_changes()
    # Without queries, keys make no difference, nor the other way round; with them, both do.
    assert torch.equal(with_changes(query=0), with_changes(query=0, key=3))
    assert torch.equal(with_changes(key=0), with_changes(key=0, query=3))
    assert not torch.allclose(with_changes(key=3), whole)
    # What attention gives is linear in the values, up to the bias of what comes behind.
    nothing = with_changes(value=0)
    assert torch.allclose(with_changes(value=3) - nothing, 3 * (whole - nothing))
    assert found["query"].shape == (stored.shape[1], stored.shape[1])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["phi3", "glm", "glm4"])
def test_gate_and_up(kind: str) -> None:
    model, config = tiny(kind, {"num_key_value_heads": 2, "head_dim": 6, "pad_token_id": 0})
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {m.label: m for m in find_matrices(shapes, config=config)}
    stored = model.get_submodule(found["up"].module).weight
    whole = output_of(model, "layers.0.mlp")
    stored[found["up"].rows_of_stored()[0]] *= 3
    assert torch.allclose(output_of(model, "layers.0.mlp"), 3 * whole)
    stored[found["gate"].rows_of_stored()[0]] *= 3
    assert not torch.allclose(output_of(model, "layers.0.mlp"), 9 * whole)


def test_what_does_not_add_up_is_left_whole() -> None:
    name = "layers.0.attention.query_key_value"
    for rows, config in (
        (72, {}),
        (72, {"model_type": "gpt_neox", "hidden_size": 24}),
        (70, {"model_type": "gpt_neox", "hidden_size": 24, "num_attention_heads": 4}),
        (24, {"model_type": "gpt_neox", "hidden_size": 24, "num_attention_heads": 4}),
    ):
        (matrix,) = find_matrices({f"{name}.weight": (rows, 24)}, config=config)
        assert (matrix.label, matrix.part) == ("query_key_value", None)


def test_the_parts_of_a_checkpoint_are_measured_apart(tmp_path: Path) -> None:
    kind = "phi3"
    model, config = tiny(kind, ATTENTION[kind][1])
    weights = {name: tensor.float().contiguous() for name, tensor in model.state_dict().items()}
    base = save_model(tmp_path / "base", weights)
    (base / "config.json").write_text(json.dumps(config))
    name = "layers.0.self_attn.qkv_proj.weight"
    tuned = {**weights, name: weights[name].clone()}
    tuned[name][24:36] *= 1.5  # the keys: two heads of six, behind four of queries
    run = save_model(tmp_path / "run", tuned)
    table = wda.compare(run, base=base, matrices="query,key,value", progress=False).table
    changed = table.set_index("matrix")["delta_m"]
    norms = weights[name].double()[24:36].norm(dim=1)
    assert changed["query"] == changed["value"] == 0
    assert changed["key"] == pytest.approx(0.5 * float(norms.mean()), rel=1e-6)
    assert dict(zip(table["matrix"], table["out_features"], strict=True)) == {
        "query": 24,
        "key": 12,
        "value": 12,
    }
