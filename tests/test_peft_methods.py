"""Every way in which peft changes weights, against the weights that peft itself merges."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import wda

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

LLAMA = transformers.LlamaConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
    vocab_size=30,
    tie_word_embeddings=False,
)
GPT2 = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=30, n_positions=16)


class Convolutions(nn.Module):
    """Kernels of one and of two dimensions, and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(6, 10, 3)
        self.point = nn.Conv2d(10, 7, 1)
        self.line = nn.Conv1d(5, 8, 3)
        self.linear = nn.Linear(12, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Grouped(nn.Module):
    """Matrices whose sizes LoKr factorises."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = nn.Linear(12, 20)
        self.wide = nn.Linear(36, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tall(x)


def llama() -> nn.Module:
    return transformers.AutoModelForCausalLM.from_config(LLAMA)


def gpt2() -> nn.Module:
    return transformers.AutoModelForCausalLM.from_config(GPT2)


@dataclass(frozen=True)
class Case:
    """A model, what peft does to it, and which matrices that changes."""

    model: Callable[[], nn.Module]
    config: Callable[[], peft.PeftConfig]
    matrices: str
    method: str
    prepare: Callable[[nn.Module, Any], None] = field(default=lambda _model, _config: None)


def lora(*targets: str, **settings: Any) -> Callable[[], peft.PeftConfig]:
    return lambda: peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": list(targets), **settings}
    )


def perturbed(adapted: nn.Module) -> None:
    """Make an adapter's numbers look trained."""
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn_like(parameter)
            if any(word in name for word in ("magnitude", "ia3_l", "boft_s")):
                parameter.mul_(1 + 0.1 * noise)
            elif "original" not in name:
                parameter.add_(0.1 * noise)


def saved_base(model: nn.Module, folder: Path) -> Path:
    """Save a base without copies of tied weights; give the folder."""
    folder.mkdir(parents=True)
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kind = getattr(getattr(model, "config", None), "model_type", "other")
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return folder


def trained(case: Case, folder: Path) -> nn.Module:
    """Save a base and an adapter of it; give the adapted model."""
    torch.manual_seed(5)
    model = case.model()
    saved_base(model, folder / "base")
    config = case.config()
    case.prepare(model, config)
    adapted = peft.get_peft_model(model, config)
    perturbed(adapted)
    adapted.save_pretrained(folder / "run" / "checkpoint-3")
    return adapted


def merged_weights(adapted: Any) -> dict[str, torch.Tensor]:
    """Give the weights as peft merges them, in float64."""
    return dict(adapted.double().merge_and_unload().state_dict())


def by_definition(w0: torch.Tensor, wt: torch.Tensor, per: str) -> tuple[float, float]:
    """ΔM and ΔD from their definitions in float64."""
    if per == "input":
        w0, wt = w0.T, wt.T
    m0, mt = w0.norm(dim=1), wt.norm(dim=1)
    return float((mt - m0).abs().mean()), float((1 - (w0 * wt).sum(dim=1) / (m0 * mt)).mean())


def agree(
    table: Any, base: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor], per: str
) -> float:
    """Compare a table with merged weights; give the largest relative deviation."""
    worst = 0.0
    for row in table.itertuples():
        name = f"{row.module}.weight"
        w0, wt = (t[name].double().flatten(1) for t in (base, truth))
        assert not torch.equal(w0, wt), name
        if row.module.endswith(("c_attn", "c_proj", "c_fc")):
            w0, wt = w0.T, wt.T
        if row.module.endswith("c_attn"):
            part = ("query", "key", "value").index(row.matrix)
            w0, wt = w0.chunk(3)[part], wt.chunk(3)[part]
        assert (row.out_features, row.in_features) == tuple(w0.shape)
        for got, expected in zip(
            (row.delta_m, row.delta_d), by_definition(w0, wt, per), strict=True
        ):
            assert got == pytest.approx(expected, rel=1e-6, abs=1e-13), name
            worst = max(worst, abs(got - expected) / max(abs(expected), 1e-13))
    return worst


QV = "query,value"

LORA: dict[str, Case] = {
    "linear": Case(llama, lora("q_proj", "v_proj", "down_proj"), f"{QV},down", "lora"),
    "rslora": Case(llama, lora("q_proj", "v_proj", use_rslora=True), QV, "lora"),
    "conv1d of gpt-2": Case(
        gpt2, lora("c_attn", "c_proj", fan_in_fan_out=True), "query,key,value,output,down", "lora"
    ),
    "embedding": Case(llama, lora("embed_tokens", "q_proj"), "embed_tokens,query", "lora"),
    "embedding dora": Case(
        llama, lora("embed_tokens", "q_proj", use_dora=True), "embed_tokens,query", "dora"
    ),
    "convolutions": Case(
        Convolutions, lora("wide", "point", "line", "linear"), "wide,point,line,linear", "lora"
    ),
    "convolutions dora": Case(
        Convolutions,
        lora("wide", "point", "line", "linear", use_dora=True),
        "wide,point,line,linear",
        "dora",
    ),
    "bias": Case(Convolutions, lora("linear", "point", lora_bias=True), "linear,point", "lora"),
    "bias of base": Case(Convolutions, lora("linear", bias="lora_only"), "linear", "lora"),
    "modules to save": Case(
        llama, lora("q_proj", modules_to_save=["lm_head"]), "query,lm_head", "lora"
    ),
    "token indices": Case(
        llama, lora("q_proj", trainable_token_indices=[3, 1, 28]), "query,embed_tokens", "lora"
    ),
    "mica": Case(llama, lora("q_proj", "v_proj", init_lora_weights="mica"), QV, "lora"),
    "orthogonal": Case(llama, lora("q_proj", "v_proj", init_lora_weights="orthogonal"), QV, "lora"),
}

REBASED: dict[str, Case] = {
    "pissa": Case(llama, lora("q_proj", "v_proj", init_lora_weights="pissa"), QV, "lora"),
    "pissa rslora dora": Case(
        llama,
        lora("q_proj", "v_proj", init_lora_weights="pissa", use_rslora=True, use_dora=True),
        QV,
        "dora",
    ),
    "pissa conv1d": Case(
        gpt2,
        lora("c_attn", "c_proj", init_lora_weights="pissa", fan_in_fan_out=True),
        "query,key,value,output,down",
        "lora",
    ),
    "olora": Case(llama, lora("q_proj", "v_proj", init_lora_weights="olora"), QV, "lora"),
}

OTHERS: dict[str, Case] = {
    "vera": Case(
        llama,
        lambda: peft.VeraConfig(r=5, target_modules=["q_proj", "v_proj", "down_proj"]),
        f"{QV},down",
        "vera",
    ),
    "vera without projections": Case(
        llama,
        lambda: peft.VeraConfig(
            r=5, target_modules=["q_proj", "v_proj", "down_proj"], save_projection=False
        ),
        f"{QV},down",
        "vera",
    ),
    "vera on conv1d": Case(
        gpt2,
        lambda: peft.VeraConfig(r=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
        "query,key,value,up",
        "vera",
    ),
    "adalora": Case(
        llama,
        lambda: peft.AdaLoraConfig(
            init_r=5, lora_alpha=7, total_step=10, target_modules=["q_proj", "v_proj"]
        ),
        QV,
        "adalora",
    ),
    "loha": Case(
        llama,
        lambda: peft.LoHaConfig(r=3, alpha=7, target_modules=["q_proj", "v_proj"]),
        QV,
        "loha",
    ),
    "loha on convolutions": Case(
        Convolutions,
        lambda: peft.LoHaConfig(r=3, alpha=7, target_modules=["wide", "line", "point", "linear"]),
        "wide,line,point,linear",
        "loha",
    ),
    "loha on effective convolutions": Case(
        Convolutions,
        lambda: peft.LoHaConfig(
            r=3, alpha=7, target_modules=["wide", "line", "point"], use_effective_conv2d=True
        ),
        "wide,line,point",
        "loha",
    ),
    "lokr": Case(
        Grouped,
        lambda: peft.LoKrConfig(r=2, alpha=7, target_modules=["tall", "wide"]),
        "tall,wide",
        "lokr",
    ),
    "lokr of both": Case(
        Grouped,
        lambda: peft.LoKrConfig(
            r=1, alpha=7, target_modules=["tall", "wide"], decompose_both=True, decompose_factor=4
        ),
        "tall,wide",
        "lokr",
    ),
    "lokr patterns": Case(
        Grouped,
        lambda: peft.LoKrConfig(
            r=2,
            alpha=7,
            target_modules=["tall", "wide"],
            rank_pattern={"tall": 1},
            alpha_pattern={"wide": 3},
        ),
        "tall,wide",
        "lokr",
    ),
    "lokr on convolutions": Case(
        Convolutions,
        lambda: peft.LoKrConfig(r=1, alpha=7, target_modules=["wide", "line", "point"]),
        "wide,line,point",
        "lokr",
    ),
    "lokr on effective convolutions": Case(
        Convolutions,
        lambda: peft.LoKrConfig(
            r=1, alpha=7, target_modules=["wide", "line"], use_effective_conv2d=True
        ),
        "wide,line",
        "lokr",
    ),
    "oft": Case(
        llama,
        lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"]),
        "query,down",
        "oft",
    ),
    "oft exact, shared": Case(
        llama,
        lambda: peft.OFTConfig(
            oft_block_size=4,
            target_modules=["q_proj", "down_proj"],
            use_cayley_neumann=False,
            block_share=True,
        ),
        "query,down",
        "oft",
    ),
    "oft of few terms": Case(
        llama,
        lambda: peft.OFTConfig(
            oft_block_size=8, target_modules=["v_proj"], num_cayley_neumann_terms=3
        ),
        "value",
        "oft",
    ),
    "oft constrained": Case(
        llama,
        lambda: peft.OFTConfig(oft_block_size=4, target_modules=["v_proj"], coft=True, eps=0.3),
        "value",
        "oft",
    ),
    "boft": Case(
        llama,
        lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj", "down_proj"]),
        "query,down",
        "boft",
    ),
    "ia3": Case(
        llama,
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "key,value,down",
        "ia3",
    ),
    "ia3 on conv1d": Case(
        gpt2,
        lambda: peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
        "query,key,value,down",
        "ia3",
    ),
    "ia3 on convolutions": Case(
        Convolutions,
        lambda: peft.IA3Config(target_modules=["wide", "point"], feedforward_modules=["point"]),
        "wide,point",
        "ia3",
    ),
}


@pytest.mark.parametrize("per", ["output", "input"])
@pytest.mark.parametrize("name", [*LORA, *REBASED, *OTHERS])
def test_the_table_is_that_of_pefts_merged_weights(name: str, per: str, tmp_path: Path) -> None:
    case = {**LORA, **REBASED, **OTHERS}[name]
    adapted = trained(case, tmp_path)
    base = load_file(tmp_path / "base" / "model.safetensors")
    truth = merged_weights(adapted)
    comparison = wda.compare(
        tmp_path / "run",
        base=tmp_path / "base",
        matrices=case.matrices,
        per=per,
        cache=False,
        progress=False,
    )
    assert set(comparison.table["matrix"]) == set(case.matrices.split(","))
    assert set(comparison.table["method"]) == {case.method}
    agree(comparison.table, base, truth, per)
