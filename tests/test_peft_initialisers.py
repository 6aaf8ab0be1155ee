"""Initialisers of peft that look at data, run by peft itself, against what it merges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import corda, eva, loraga
from safetensors.torch import load_file
from test_peft_methods import agree, gpt2, llama, merged_weights, saved_base
from torch import nn

import wda
from wda.checkpoints import Given
from wda.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, 30, (3, 8), generator=generator) for _ in range(count)]
    return [{"input_ids": t, "labels": t, "attention_mask": torch.ones_like(t)} for t in tokens]


def with_eva(model: nn.Module, **settings: Any) -> Any:
    said = peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0), **settings)
    adapted = peft.get_peft_model(model, said)
    eva.initialize_lora_eva_weights(adapted, batches(), show_progress_bar=False)
    return adapted


def with_corda(model: nn.Module, method: str, **settings: Any) -> Any:
    said = peft.LoraConfig(
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=method),
        **settings,
    )

    def run() -> None:
        for batch in batches(8):  # of which it takes one text at a time
            model(**{key: value[:1] for key, value in batch.items()})

    corda.preprocess_corda(model, said, run_model=run)
    return peft.get_peft_model(model, said)


def with_lora_ga(model: nn.Module, **settings: Any) -> Any:
    said = peft.LoraConfig(
        init_lora_weights="lora_ga",
        lora_ga_config=peft.tuners.lora.config.LoraGAConfig(stable_gamma=64),
        **settings,
    )

    def step() -> None:
        for batch in batches():
            model(**batch).loss.backward()

    loraga.preprocess_loraga(model, said, step)
    return peft.get_peft_model(model, said)


def train(adapted: nn.Module) -> None:
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    for batch in batches():
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


Start = Callable[..., Any]
INITIALISERS: dict[str, tuple[Callable[[], nn.Module], Start, dict[str, Any], bool]] = {
    "eva": (llama, with_eva, {}, False),
    "eva dora": (llama, with_eva, {"use_dora": True}, False),
    "corda": (llama, lambda m, **s: with_corda(m, "ipm", **s), {}, True),
    "corda of knowledge": (llama, lambda m, **s: with_corda(m, "kpm", **s), {}, True),
    "corda rslora": (
        llama,
        lambda m, **s: with_corda(m, "ipm", **s),
        {"use_rslora": True},
        True,
    ),
    "lora-ga": (llama, with_lora_ga, {}, True),
    "lora-ga dora": (llama, with_lora_ga, {"use_dora": True}, True),
    "lora-ga conv1d": (gpt2, with_lora_ga, {"fan_in_fan_out": True}, True),
    "lora-ga in half precision": (lambda: llama().bfloat16(), with_lora_ga, {}, True),
}


@pytest.mark.parametrize("name", INITIALISERS)
def test_what_they_leave_of_w0_is_known(name: str, tmp_path: Path) -> None:
    build, start, settings, needs_initial = INITIALISERS[name]
    torch.manual_seed(5)
    model = build()
    saved_base(model, tmp_path / "base")
    conv1d = "fan_in_fan_out" in settings
    targets = ["c_attn", "mlp.c_proj"] if conv1d else ["q_proj", "v_proj", "down_proj"]
    adapted = start(model, r=4, lora_alpha=6, target_modules=targets, **settings)
    adapted.save_pretrained(tmp_path / "before")
    train(adapted)
    adapted.save_pretrained(tmp_path / "run" / "checkpoint-4")
    truth = merged_weights(adapted)

    def compared(**given: str) -> wda.Comparison:
        return wda.compare(
            tmp_path / "run",
            tmp_path / "base",
            "query,value,down",
            cache=False,
            progress=False,
            given=Given(**given),  # type: ignore[arg-type]
        )

    if needs_initial:
        with pytest.raises(CheckpointError, match="--initial"):
            compared()
    comparison = compared(**({"initial": str(tmp_path / "before")} if needs_initial else {}))
    base = load_file(tmp_path / "base" / "model.safetensors")
    agree(comparison.table, base, truth, "output")
    assert len(comparison.table) == 6
    assert comparison.notes == ()
    if needs_initial:  # before the training there is nothing but rounding
        before = wda.compare(
            tmp_path / "before",
            tmp_path / "base",
            "query,value,down",
            cache=False,
            progress=False,
            given=Given(initial=str(tmp_path / "before")),
        ).table
        if not settings.get("use_dora"):
            rounding = 1e-4 if "half" in name else 1e-10
            assert (before.delta_d < rounding).all()
        assert (comparison.table.delta_d > 1e-5).all()
