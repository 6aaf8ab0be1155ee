"""Our LoRA and DoRA against the paper's equations, autograd and the real peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import wda
from wda.adapters import (
    AdapterConfig,
    DoRALinear,
    LoRALinear,
    inject,
    load_adapter,
    save_adapter,
)
from wda.errors import CheckpointError, SelectionError

OUT, IN, RANK, SCALING = 6, 10, 3, 16 / 3


def dora_layer(full_gradient: bool, bias: bool = True) -> DoRALinear:
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(IN, OUT, bias=bias).double(), RANK, SCALING, full_gradient)
    with torch.no_grad():
        layer.B.copy_(0.1 * torch.randn(OUT, RANK))
        layer.magnitude.mul_(1 + 0.2 * torch.randn(OUT))
    return layer


def merged(layer: DoRALinear) -> torch.Tensor:
    v = layer.base_layer.weight + layer.scaling * layer.B @ layer.A
    return layer.magnitude[:, None] * v / v.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_starts_as_the_layer_it_wraps_to_the_last_bit(kind: type[LoRALinear]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    x = torch.randn(5, 7, IN)
    before = linear(x)
    layer = kind(linear, RANK, SCALING)
    assert torch.equal(layer(x), before)
    assert layer.A.abs().max() <= (1 / IN) ** 0.5  # Kaiming-uniform with a = √5
    assert layer.A.std() > 0
    assert not any(p.requires_grad for p in linear.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_dora_forward_is_the_merged_weights(bias: bool) -> None:
    layer = dora_layer(full_gradient=False, bias=bias)
    x = torch.randn(4, IN, dtype=torch.float64)
    expected = nn.functional.linear(x, merged(layer), layer.base_layer.bias)
    assert torch.allclose(layer(x), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("full_gradient", [True, False])
def test_dora_gradients_are_the_papers(full_gradient: bool) -> None:
    """Eq. 6 (through the norm), 11 (norm held constant) and 7, carried on to A, B and m."""
    layer = dora_layer(full_gradient)
    x = torch.randn(4, IN, dtype=torch.float64)
    target = torch.randn(4, OUT, dtype=torch.float64)
    (layer(x) - target).square().sum().backward()

    w = merged(layer).detach()
    error = nn.functional.linear(x, w, layer.base_layer.bias) - target
    grad_w = 2 * error.T @ x  # ∇_{W'} of the loss
    v = (layer.base_layer.weight + layer.scaling * layer.B @ layer.A).detach()
    norm = v.norm(dim=1, keepdim=True)
    m = layer.magnitude.detach()[:, None]
    grad_v = m / norm * grad_w
    if full_gradient:
        grad_v = grad_v - m / norm * (grad_w * v).sum(dim=1, keepdim=True) * v / norm**2
        assert torch.allclose((grad_v * v).sum(dim=1), torch.zeros(OUT).double(), atol=1e-12)
    expected_b = layer.scaling * grad_v @ layer.A.detach().T
    expected_a = layer.scaling * layer.B.detach().T @ grad_v
    expected_m = (grad_w * v / norm).sum(dim=1)
    assert torch.allclose(layer.B.grad, expected_b, rtol=1e-10)
    assert torch.allclose(layer.A.grad, expected_a, rtol=1e-10)
    assert torch.allclose(layer.magnitude.grad, expected_m, rtol=1e-10)


def test_full_gradient_passes_gradcheck() -> None:
    layer = dora_layer(full_gradient=True)
    x = torch.randn(2, IN, dtype=torch.float64)

    def loss(A: torch.Tensor, B: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"A": A, "B": B, "magnitude": magnitude}, x)

    inputs = [p.detach().clone().requires_grad_() for p in (layer.A, layer.B, layer.magnitude)]
    assert torch.autograd.gradcheck(loss, inputs)


def tiny_llama() -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        vocab_size=50,
        num_labels=3,
        pad_token_id=0,
    )
    return transformers.LlamaForSequenceClassification(config)


def trained(method: str) -> tuple[Any, AdapterConfig]:
    model = tiny_llama()
    config = AdapterConfig(method=method, rank=3, alpha=7, targets=["query", "v_proj", "down"])
    inject(model, config, trained_whole=("score",))
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    0.1 * torch.randn_like(parameter) * parameter.abs().mean().clamp(min=0.1)
                )
    return model.eval(), config


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_loads_our_adapters_with_the_same_logits(method: str, tmp_path: Path) -> None:
    base = tiny_llama()
    model, config = trained(method)
    save_adapter(
        model, config, tmp_path, "some/base", trained_whole=("score",), task_type="SEQ_CLS"
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.randint(1, 50, (4, 9))
    with torch.no_grad():
        ours_logits = model.double()(ids).logits
        their_logits = theirs.double()(ids).logits
        base_logits = tiny_llama().double().eval()(ids).logits
    assert torch.allclose(ours_logits, their_logits, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(ours_logits, base_logits, rtol=1e-2)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == [
        "score"
    ]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_our_adapters_enter_the_analysis_by_the_same_door(method: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model, config = trained(method)
    save_adapter(model, config, tmp_path / "a", str(tmp_path / "base"), trained_whole=("score",))
    table = wda.compare(tmp_path / "a", matrices=["query", "value", "down"], progress=False).table
    assert len(table) == 6
    for _, row in table.iterrows():
        layer = model.get_submodule(row["module"]).double()
        w0 = layer.base_layer.weight.detach()
        wt = w0 + layer.scaling * (layer.B @ layer.A).detach()
        if method == "dora":
            wt = layer.magnitude.detach()[:, None] * wt / wt.norm(dim=1, keepdim=True)
        d = wda.decompose(w0, wt)
        assert (row["delta_m"], row["delta_d"]) == pytest.approx((d.delta_m, d.delta_d), rel=1e-6)
        assert d.delta_d > 1e-4


def test_saved_adapters_come_back(tmp_path: Path) -> None:
    model, config = trained("dora")
    save_adapter(model, config, tmp_path, "b", trained_whole=("score",))
    again = tiny_llama()
    inject(again, config, trained_whole=("score",))
    load_adapter(again, tmp_path, trained_whole=("score",))
    for (name, one), (_, other) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(one, other) or not one.requires_grad, name
    lora = tiny_llama()
    inject(lora, config.model_copy(update={"method": "lora"}), trained_whole=("score",))
    with pytest.raises(CheckpointError, match="does not hold this model's adapters.*magnitude"):
        load_adapter(lora, tmp_path, trained_whole=("score",))


def test_only_what_should_be_trained_is() -> None:
    model = tiny_llama()
    count = inject(model, AdapterConfig(method="dora", rank=2, targets=["query"]), ("score",))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert count == 2
    assert names == {"score.weight"} | {
        f"model.layers.{i}.self_attn.q_proj.{p}" for i in (0, 1) for p in ("A", "B", "magnitude")
    }


def test_targets_that_cannot_be_adapted_are_named() -> None:
    with pytest.raises(SelectionError, match="'gatee'; labels that exist here"):
        inject(tiny_llama(), AdapterConfig(method="lora", targets=["gatee"]))
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_embd=24, n_layer=1, n_head=4))
    with pytest.raises(
        SelectionError, match=r"adapters go into nn.Linear layers; .*c_attn are Conv1D"
    ):
        inject(gpt2, AdapterConfig(method="lora", targets=["query"]))
