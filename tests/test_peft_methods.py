"""Every way in which peft changes weights, against the weights that peft itself merges."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import wda
from wda.checkpoints import Given, open_base, open_checkpoint
from wda.errors import MissingExtraError, WdaError
from wda.naming import find_matrices

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


class Turned(nn.Module):
    """Weights stored as (in, out), by names that do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = transformers.pytorch_utils.Conv1D(20, 12)
        self.square = transformers.pytorch_utils.Conv1D(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x)


class Woven(nn.Module):
    """Matrices whose input features fall into powers of two of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 9)
        self.second = nn.Linear(32, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


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


def trained(case: Case, folder: Path) -> Any:
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
    "pissa in half precision": Case(
        lambda: llama().to(torch.bfloat16),
        lora("q_proj", "v_proj", init_lora_weights="pissa"),
        QV,
        "lora",
    ),
    "olora in half precision": Case(
        lambda: llama().to(torch.bfloat16),
        lora("q_proj", "v_proj", init_lora_weights="olora"),
        QV,
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
    assert [n for n in comparison.notes if "not read" in n] == NAMED.get(name, [])


# What is trained beside the matrices has no row, and is named.
NAMED = {
    "bias": [
        "run: tensors that were not read: base_model.model.linear.lora_B.bias, "
        "base_model.model.point.lora_B.bias"
    ],
    "bias of base": ["run: tensors that were not read: base_model.model.linear.base_layer.bias"],
}

QD = ["q_proj", "down_proj"]

# Methods that peft itself merges, with the settings that fit such small matrices.
MERGED: dict[str, tuple[str, dict[str, Any]]] = {
    "ADAMSS": ("ADAMSS", {}),
    "C3A": ("C3A", {"block_size": 4}),
    "DEFT": ("DEFT", {}),
    "DELORA": ("DELORA", {}),
    "FOURIERFT": ("FOURIERFT", {"n_frequency": 50}),
    "GLORA": ("GLORA", {}),
    "GRALORA": ("GRALORA", {}),
    "HIRA": ("HIRA", {}),
    "HRA": ("HRA", {}),
    "MISS": ("MISS", {"r": 4}),
    "MISS bat": ("MISS", {"r": 4, "init_weights": "bat"}),
    "OSF": ("OSF", {}),
    "PEANUT": ("PEANUT", {}),
    "PSOFT": ("PSOFT", {"r": 4}),
    "PVERA": ("PVERA", {}),
    "PVERA unsaved": ("PVERA", {"save_projection": False}),
    "RANDLORA": ("RANDLORA", {}),
    "RANDLORA conv1d": ("RANDLORA", {"fan_in_fan_out": True}),
    "RANDLORA unsaved": ("RANDLORA", {"save_projection": False}),
    "ROAD": ("ROAD", {"group_size": 4}),
    "SHIRA": ("SHIRA", {"r": 4}),
    "SUPERTUNING": ("SUPERTUNING", {}),
    "VBLORA": ("VBLORA", {"vector_length": 4, "num_vectors": 12}),
    "VBLORA saved top": (
        "VBLORA",
        {"vector_length": 4, "num_vectors": 12, "save_only_topk_weights": True},
    ),
    "WAVEFT": ("WAVEFT", {"n_frequency": 50}),
    "BDLORA": (
        "LORA",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_bdlora": peft.tuners.lora.config.BdLoraConfig(
                target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj"], nblocks=2
            ),
        },
    ),
    "KASA": (
        "LORA",
        {"r": 4, "lora_alpha": 6, "kasa_config": peft.tuners.lora.config.KasaConfig()},
    ),
}


@pytest.mark.parametrize("name", MERGED)
def test_peft_merges_what_has_no_reader(name: str, tmp_path: Path) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind, settings = MERGED[name]
    conv1d = "fan_in_fan_out" in settings
    targets = ["c_attn", "mlp.c_proj"] if conv1d else QD
    case = Case(
        gpt2 if conv1d else llama,
        lambda: PEFT_TYPE_TO_CONFIG_MAPPING[kind](target_modules=targets, **settings),
        "query,down",
        kind.lower(),
    )
    adapted = trained(case, tmp_path)
    base = load_file(tmp_path / "base" / "model.safetensors")
    truth = merged_weights(adapted)
    comparison = wda.compare(
        tmp_path / "run",
        base=tmp_path / "base",
        matrices=case.matrices,
        cache=False,
        progress=False,
    )
    assert len(comparison.table) == 4
    agree(comparison.table, base, truth, "output")
    (checkpoint,) = comparison.provenance["checkpoints"]
    assert checkpoint["layout"] == "PEFT adapter, merged by peft itself"
    # HRA turns vectors and leaves their lengths: its ΔM is rounding.
    assert [note for note in comparison.notes if "below_floor" not in note] == []


def test_a_bias_beside_what_peft_merges_is_named(tmp_path: Path) -> None:
    config = peft.FourierFTConfig(n_frequency=50, target_modules=["linear"], bias="fourier_only")
    trained(Case(Convolutions, lambda: config, "linear", "fourierft"), tmp_path)
    checkpoint = open_checkpoint(tmp_path / "run" / "checkpoint-3")
    assert checkpoint.unread
    assert all(name.endswith(".bias") for name in checkpoint.unread)


def compared(folder: Path, matrices: str, **options: Any) -> Any:
    return wda.compare(
        folder / "run",
        base=folder / "base",
        matrices=matrices,
        cache=False,
        progress=False,
        **options,
    ).table


def base_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "base" / "model.safetensors")


def rewritten(folder: Path, **changes: Any) -> None:
    """Change fields of the configuration; … removes one."""
    file = folder / "run" / "checkpoint-3" / "adapter_config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def as_state_dict(adapted: nn.Module, folder: Path) -> None:
    """Put the state dict of the whole PeftModel in place of the adapter."""
    saved = folder / "run" / "checkpoint-3"
    (saved / "adapter_model.safetensors").unlink()
    torch.save(dict(adapted.state_dict()), saved / "pytorch_model.bin")


@pytest.mark.parametrize("name", ["linear", "embedding dora", "modules to save", "token indices"])
def test_a_peft_models_own_state_dict(name: str, tmp_path: Path) -> None:
    adapted = trained(LORA[name], tmp_path)
    as_state_dict(adapted, tmp_path)
    table = compared(tmp_path, LORA[name].matrices)
    changed = table[table.delta_d > 0]
    assert set(changed["matrix"]) == set(LORA[name].matrices.split(","))
    agree(changed, base_of(tmp_path), merged_weights(adapted), "output")


@pytest.mark.parametrize("initialiser", ["pissa_niter_4", "corda", "lora_ga"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_initialiser_that_needs_the_adapter_before_training(
    initialiser: str, dora: bool, tmp_path: Path
) -> None:
    # What the three leave of W0 is W0 − s·B0·A0; only how A0 and B0 come about differs, and that of
    # the last two needs data. The first is run, and its result is passed off as the others'.
    torch.manual_seed(6)
    model = llama()
    saved_base(model, tmp_path / "base")
    config = lora("q_proj", "v_proj", init_lora_weights="pissa_niter_4", use_dora=dora)()
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "before")
    perturbed(adapted)
    adapted.save_pretrained(tmp_path / "run" / "checkpoint-3")
    rewritten(tmp_path, init_lora_weights=initialiser)
    with pytest.raises(WdaError, match="cannot be computed again; .* --initial"):
        compared(tmp_path, QV)
    table = compared(tmp_path, QV, given=Given(initial=str(tmp_path / "before")))
    truth = merged_weights(adapted)
    agree(table, base_of(tmp_path), truth, "output")


def test_the_base_that_an_initialiser_left(tmp_path: Path) -> None:
    torch.manual_seed(6)
    model = llama()
    saved_base(model, tmp_path / "base")
    adapted: Any = peft.get_peft_model(model, lora("q_proj", "v_proj")())
    with torch.no_grad():  # as a quantisation would
        for name, parameter in adapted.named_parameters():
            if name.endswith("base_layer.weight"):
                parameter.copy_((parameter * 64).round() / 64)
    perturbed(adapted)
    adapted.save_pretrained(tmp_path / "run" / "checkpoint-3")
    rewritten(tmp_path, init_lora_weights="loftq")
    left = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in adapted.state_dict().items()
        if "lora_" not in name
    }
    (tmp_path / "left").mkdir()
    save_file(left, tmp_path / "left" / "model.safetensors")
    with pytest.raises(WdaError, match="the base that it left with --initial"):
        compared(tmp_path, QV)
    with pytest.raises(WdaError, match="is an adapter; loftq leaves a quantised base"):
        compared(tmp_path, QV, given=Given(initial=str(tmp_path / "run" / "checkpoint-3")))
    table = compared(tmp_path, QV, given=Given(initial=str(tmp_path / "left")))
    agree(table, base_of(tmp_path), merged_weights(adapted), "output")


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 3}}])
def test_a_converted_adapter_is_plain_lora(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(6)
    model = llama()
    saved_base(model, tmp_path / "base")
    config = lora("q_proj", "v_proj", init_lora_weights="pissa", **settings)()
    adapted = peft.get_peft_model(model, config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "before")
    adapted.peft_config["default"].init_lora_weights = "pissa"
    perturbed(adapted)
    adapted.save_pretrained(
        tmp_path / "run" / "checkpoint-3",
        path_initial_model_for_weight_conversion=str(tmp_path / "before"),
    )
    table = compared(tmp_path, QV)
    adapted.set_adapter("default")
    truth = merged_weights(adapted)
    assert len(table) == 4
    for row in table.itertuples():  # the conversion rounds in float32
        w0, wt = (t[f"{row.module}.weight"].double() for t in (base_of(tmp_path), truth))
        assert row.delta_d == pytest.approx(by_definition(w0, wt, "output")[1], rel=1e-5)


def test_pruned_adalora(tmp_path: Path) -> None:
    adapted = trained(OTHERS["adalora"], tmp_path)
    keep = [True, False, True, True, False]
    names = [n for n, _ in adapted.named_parameters() if "lora_E" in n]
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_E" in name:
                parameter[~torch.tensor(keep)] = 0.0
    config = adapted.peft_config["default"]
    config.rank_pattern = {n.removeprefix("base_model.model."): keep for n in names}
    adapted.save_pretrained(tmp_path / "run" / "checkpoint-3")
    tensors = load_file(tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in tensors.items() if name.endswith("lora_A")} == {3}
    agree(compared(tmp_path, QV), base_of(tmp_path), merged_weights(adapted), "output")


MOE = {
    "mixtral": lambda: transformers.MixtralConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        vocab_size=30,
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        hidden_size=24,
        moe_intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=3,
        num_experts_per_tok=2,
        vocab_size=30,
        head_dim=6,
    ),
}


@pytest.mark.parametrize("kind", MOE)
@pytest.mark.parametrize(
    "targets", [["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]], ids=str
)
def test_stacked_experts(kind: str, targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(8)
    model = transformers.AutoModelForCausalLM.from_config(MOE[kind]())
    model.save_pretrained(tmp_path / "base")
    parameters = [f"mlp.experts.{target}" for target in targets]
    adapted: Any = peft.get_peft_model(
        model, lora("q_proj", r=2, target_parameters=parameters, use_rslora=True)()
    )
    perturbed(adapted)
    adapted.save_pretrained(tmp_path / "run" / "checkpoint-3")
    table = compared(tmp_path, "re:experts|q_proj")
    merged = merged_weights(adapted)
    truth = dict(merged)
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for layer in range(2):
        stacked = f"model.layers.{layer}.mlp.experts"
        gates = merged[f"{stacked}.gate_up_proj"].chunk(2, dim=1)
        parts = {"gate_proj": gates[0], "up_proj": gates[1]}
        parts["down_proj"] = merged[f"{stacked}.down_proj"]
        for label, tensor in parts.items():
            for expert, weight in enumerate(tensor):
                truth[f"{stacked}.{expert}.{label}.weight"] = weight
                mixtral = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                truth[f"{mixtral}.{names[label]}.weight"] = weight
    matrices = sum({"gate_up_proj": 2, "down_proj": 1}[target] for target in targets)
    assert len(table) == 2 * (1 + 3 * matrices)
    agree(table, base_of(tmp_path), truth, "output")


def test_replicated_layers_are_those_of_the_base(tmp_path: Path) -> None:
    ranges = [[1, 2], [0, 1]]
    adapted = trained(
        Case(llama, lora("q_proj", "v_proj", layer_replication=ranges), QV, "lora"), tmp_path
    )
    merged = merged_weights(adapted)
    truth = {
        name.replace("layers.0.", "layers.?.").replace("layers.1.", "layers.0."): weight
        for name, weight in merged.items()
    }
    truth = {name.replace("layers.?.", "layers.1."): weight for name, weight in truth.items()}
    agree(compared(tmp_path, QV), base_of(tmp_path), truth, "output")


def test_patterns_that_versions_match_differently(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"1.self_attn.v_proj": 11}}
    adapted = trained(Case(llama, lora("q_proj", "v_proj", **patterns), QV, "lora"), tmp_path)
    truth = merged_weights(adapted)
    agree(compared(tmp_path, QV), base_of(tmp_path), truth, "output")
    rewritten(tmp_path, peft_version=..., target_parameters=...)
    agree(compared(tmp_path, QV), base_of(tmp_path), truth, "output")  # its fields tell
    rewritten(tmp_path, megatron_core=...)
    with pytest.raises(WdaError, match="α = 6 up to 0.13, α = 11 in 0.14, α = 11 since 0.15"):
        compared(tmp_path, QV)
    rewritten(tmp_path, peft_version="0.15.1")
    agree(compared(tmp_path, QV), base_of(tmp_path), truth, "output")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("linear", {"use_qalora": True}, "use_qalora adds to a weight quantised in groups"),
        ("linear", {"alora_invocation_tokens": [1]}, "alora_invocation_tokens changes some tokens"),
        ("linear", {"init_lora_weights": "new"}, "'new' is not known, and it may change the base"),
        ("linear", {"rank_pattern": {"q_proj": 9}}, r"q_proj \(rank 4 in the file, 9 in the conf"),
        ("linear", {"layer_replication": [[0, 2], [1, 2]]}, "uses layer 1 of the base twice"),
        (
            "conv1d of gpt-2",
            {"use_dora": True, "peft_version": "0.10.0"},
            "peft before 0.11 divided a Conv1D's DoRA by the lengths of the wrong axis",
        ),
        ("token indices", {"trainable_token_indices": [3, 1]}, "has 3 rows, but .* names 2 tokens"),
        ("token indices", {"trainable_token_indices": [3, 1, 99]}, "row 99 of .*, which has 30"),
        ("oft", {"use_cayley_neumann": ...}, "use_cayley_neumann missing, which tells how"),
        ("ia3", {"feedforward_modules": []}, "does not fit feedforward_modules"),
        ("loha", {"alpha": ...}, "alpha missing; the scaling needs it"),
        ("adalora", {"init_r": ...}, "init_r missing; the scaling needs it"),
        ("linear", {"peft_type": "TINYLORA"}, "'TINYLORA' is not read: either no weight changes"),
        ("linear", {"peft_type": "PREFIX_TUNING"}, "stand beside the weights and change none"),
        ("linear", {"peft_type": "LATER"}, "knows no peft_type 'LATER'; install the version"),
        ("linear", {"peft_type": "HRA"}, "no tensor of a HRA adapter"),
    ],
)
def test_what_cannot_be_read_right_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    case = {**LORA, **OTHERS}[name]
    trained(case, tmp_path)
    rewritten(tmp_path, **changes)
    with pytest.raises(WdaError, match=message):
        compared(tmp_path, case.matrices)


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("per", ["output", "input"])
def test_rotations_that_weave_blocks(
    factor: int, per: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # peft weaves with a CUDA extension alone; what that does is to put blocks on a diagonal.
    from peft.tuners.boft import layer

    def on_diagonals(blocks: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.block_diag(*of_level) for of_level in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer.FastBlockDiag, "apply", on_diagonals)
    case = Case(
        Woven,
        lambda: peft.BOFTConfig(
            boft_block_size=4, boft_n_butterfly_factor=factor, target_modules=["first", "second"]
        ),
        "first,second",
        "boft",
    )
    adapted = trained(case, tmp_path)
    table = compared(tmp_path, case.matrices, per=per)
    agree(table, base_of(tmp_path), merged_weights(adapted), per)


def test_a_method_that_only_peft_merges_needs_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(Case(llama, lambda: peft.HRAConfig(target_modules=QD), "query,down", "hra"), tmp_path)
    monkeypatch.setitem(sys.modules, "peft.mapping", None)
    with pytest.raises(MissingExtraError, match=r"pip install '.*\[peft\]'"):
        compared(tmp_path, "query")


@pytest.mark.parametrize("name", ["vera", "adalora", "loha", "lokr", "boft"])
def test_a_tensor_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    trained(OTHERS[name], tmp_path)
    file = tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = next(n for n in tensors if n.endswith(("_d", "lora_E", "w2_b", "boft_s")))
    save_file({n: t for n, t in tensors.items() if n != lost}, file)
    kind = lost.rpartition(".")[2]
    with pytest.raises(WdaError, match=f"{kind} is missing for "):
        compared(tmp_path, OTHERS[name].matrices)


@pytest.mark.parametrize("name", [*LORA, *REBASED, *OTHERS])
def test_an_update_of_some_rows_is_that_of_all(name: str, tmp_path: Path) -> None:
    trained({**LORA, **REBASED, **OTHERS}[name], tmp_path)
    base = open_base(tmp_path / "base")
    checkpoint = open_checkpoint(tmp_path / "run" / "checkpoint-3")
    shapes = {name: entry.shape for name, entry in base.tensors.items()}
    for matrix in find_matrices(shapes, checkpoint.says_transposed, base.config):
        if matrix.module not in checkpoint.modules:
            continue
        w0 = base.weight(matrix.module, matrix).double()
        whole = checkpoint.update(matrix.module, matrix, base).delta(w0, slice(None))
        assert whole.abs().max() > 0
        for rows in (slice(0, 2), slice(2, 6), slice(6, None)):
            some = checkpoint.update(matrix.module, matrix, base, rows)
            assert torch.allclose(some.delta(w0[rows], slice(None)), whole[rows], atol=1e-12)
            picked = some.delta(w0[rows][:1], torch.tensor([0]))
            assert torch.allclose(picked, whole[rows][:1], atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "embedding dora", "pissa"])
def test_a_state_dict_without_configuration_needs_alpha(name: str, tmp_path: Path) -> None:
    case = {**LORA, **REBASED}[name]
    adapted = trained(case, tmp_path)
    as_state_dict(adapted, tmp_path)
    (tmp_path / "run" / "checkpoint-3" / "adapter_config.json").unlink()
    with pytest.raises(WdaError, match="without adapter_config.json, which has its α; .* --alpha"):
        compared(tmp_path, case.matrices)
    table = compared(tmp_path, case.matrices, given=Given(alpha=6.0))
    assert set(table["method"]) == {case.method}
    agree(table[table.delta_d > 0], base_of(tmp_path), merged_weights(adapted), "output")


def test_tokens_alone(tmp_path: Path) -> None:
    case = Case(
        llama,
        lambda: peft.TrainableTokensConfig(token_indices=[7, 2], target_modules=["embed_tokens"]),
        "embed_tokens",
        "trainable_tokens",
    )
    adapted = trained(case, tmp_path)
    table = compared(tmp_path, case.matrices)
    assert set(table["method"]) == {case.method}
    agree(table, base_of(tmp_path), merged_weights(adapted), "output")


@pytest.mark.parametrize("name", ["linear", "pissa"])
def test_a_packed_base_beside_the_adapter_is_not_w0(name: str, tmp_path: Path) -> None:
    case = {**LORA, **REBASED}[name]
    adapted = trained(case, tmp_path)
    as_state_dict(adapted, tmp_path)
    file = tmp_path / "run" / "checkpoint-3" / "pytorch_model.bin"
    tensors = torch.load(file)
    packed = {
        name: tensor.flatten()[::2, None].to(torch.uint8)
        if name.endswith("base_layer.weight")
        else tensor
        for name, tensor in tensors.items()
    }
    torch.save(packed, file)
    table = compared(tmp_path, case.matrices)
    agree(table[table.delta_d > 0], base_of(tmp_path), merged_weights(adapted), "output")


def test_kept_results_tell_updates_apart(tmp_path: Path) -> None:
    for name in ("oft", "ia3", "pissa", "vera without projections", "token indices"):
        folder = tmp_path / name
        case = {**LORA, **REBASED, **OTHERS}[name]
        trained(case, folder)
        options: dict[str, Any] = {"base": folder / "base", "matrices": case.matrices}
        first = wda.compare(folder / "run", cache=folder / "kept", progress=False, **options)
        again = wda.compare(folder / "run", cache=folder / "kept", progress=False, **options)
        assert first.notes != again.notes
        assert "rows were computed before" in again.notes[-1]
        pd.testing.assert_frame_equal(first.table, again.table)
    rewritten(tmp_path / "oft", num_cayley_neumann_terms=3)
    other = wda.compare(
        tmp_path / "oft" / "run",
        base=tmp_path / "oft" / "base",
        matrices="query,down",
        cache=tmp_path / "oft" / "kept",
        progress=False,
    )
    assert not any("rows were computed before" in note for note in other.notes)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (peft.LoraConfig, {"r": 3, "lora_alpha": 5}),
        (peft.LoraConfig, {"r": 3, "lora_alpha": 5, "use_dora": True}),
        (peft.VeraConfig, {"r": 5}),
        (peft.VeraConfig, {"r": 5, "save_projection": False}),
        (peft.IA3Config, {"feedforward_modules": ["square"]}),
        (peft.RandLoraConfig, {}),
        (peft.RandLoraConfig, {"save_projection": False}),
    ],
)
def test_weights_stored_transposed(config: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    case = Case(
        Turned,
        lambda: config(target_modules=["mix", "square"], fan_in_fan_out=True, **settings),
        "mix,square",
        "",
    )
    adapted = trained(case, tmp_path)
    table = compared(tmp_path, case.matrices).set_index("module")
    base, truth = base_of(tmp_path), merged_weights(adapted)
    assert set(table.index) == {"mix", "square"}
    for module, row in table.iterrows():
        w0, wt = (t[f"{module}.weight"].double().T for t in (base, truth))
        assert (row.out_features, row.in_features) == tuple(w0.shape)
        expected = by_definition(w0, wt, "output")
        assert (row.delta_m, row.delta_d) == pytest.approx(expected, rel=1e-6, abs=1e-13)
