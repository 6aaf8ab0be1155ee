"""Our LoRA and DoRA against the paper's equations, autograd and the real peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapted
import peft
import pytest
import torch
import transformers
from adapted import adapt, only
from torch import nn

import wda
from wda.adapters import AdaptedLayer, AdapterConfig, inject, load_adapter, save_adapter
from wda.errors import CheckpointError, SelectionError
from wda.updates import merged

OUT, IN, RANK, ALPHA = 6, 10, 3, 16


def dora_layer(full_gradient: bool, bias: bool = True) -> AdaptedLayer:
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=bias).double()
    layer = adapt(linear, "dora", rank=RANK, alpha=ALPHA, full_gradient=full_gradient)
    with torch.no_grad():
        only(layer).B.copy_(0.1 * torch.randn(OUT, RANK))
        only(layer).magnitude.mul_(1 + 0.2 * torch.randn(OUT))
    return layer


def direction(layer: AdaptedLayer) -> torch.Tensor:
    return layer.weight + ALPHA / RANK * only(layer).B @ only(layer).A


def weight_of(layer: AdaptedLayer) -> torch.Tensor:
    v = direction(layer)
    return only(layer).magnitude[:, None] * v / v.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_starts_as_the_layer_it_wraps_to_the_last_bit(method: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    x = torch.randn(5, 7, IN)
    before = linear(x)
    layer = adapt(linear, method, rank=RANK, alpha=ALPHA)
    assert torch.equal(layer(x), before)
    assert only(layer).A.abs().max() <= (1 / IN) ** 0.5  # Kaiming-uniform with a = √5
    assert only(layer).A.std() > 0
    assert not any(p.requires_grad for p in linear.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_dora_forward_is_the_merged_weights(bias: bool) -> None:
    layer = dora_layer(full_gradient=False, bias=bias)
    x = torch.randn(4, IN, dtype=torch.float64)
    expected = nn.functional.linear(x, weight_of(layer), layer.base_layer.bias)
    assert torch.allclose(layer(x), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("full_gradient", [True, False])
def test_dora_gradients_are_the_papers(full_gradient: bool) -> None:
    """Eq. 6 (through the norm), 11 (norm held constant) and 7, carried on to A, B and m."""
    layer = dora_layer(full_gradient)
    x = torch.randn(4, IN, dtype=torch.float64)
    target = torch.randn(4, OUT, dtype=torch.float64)
    (layer(x) - target).square().sum().backward()

    w, adapter = weight_of(layer).detach(), only(layer)
    error = nn.functional.linear(x, w, layer.base_layer.bias) - target
    grad_w = 2 * error.T @ x  # ∇_{W'} of the loss
    v = direction(layer).detach()
    norm = v.norm(dim=1, keepdim=True)
    m = adapter.magnitude.detach()[:, None]
    grad_v = m / norm * grad_w
    if full_gradient:
        grad_v = grad_v - m / norm * (grad_w * v).sum(dim=1, keepdim=True) * v / norm**2
        assert torch.allclose((grad_v * v).sum(dim=1), torch.zeros(OUT).double(), atol=1e-12)
    expected_b = ALPHA / RANK * grad_v @ adapter.A.detach().T
    expected_a = ALPHA / RANK * adapter.B.detach().T @ grad_v
    expected_m = (grad_w * v / norm).sum(dim=1)
    assert torch.allclose(adapter.B.grad, expected_b, rtol=1e-10)
    assert torch.allclose(adapter.A.grad, expected_a, rtol=1e-10)
    assert torch.allclose(adapter.magnitude.grad, expected_m, rtol=1e-10)


def test_full_gradient_passes_gradcheck() -> None:
    layer = dora_layer(full_gradient=True)
    x = torch.randn(2, IN, dtype=torch.float64)

    def loss(A: torch.Tensor, B: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
        values = {"A": A, "B": B, "magnitude": magnitude}
        named = {f"adapters.default.{name}": value for name, value in values.items()}
        return torch.func.functional_call(layer, named, x)

    trained = (only(layer).A, only(layer).B, only(layer).magnitude)
    inputs = [p.detach().clone().requires_grad_() for p in trained]
    assert torch.autograd.gradcheck(loss, inputs)


def tiny_llama() -> Any:
    return adapted.tiny_llama(transformers.LlamaForSequenceClassification, seed=3)


def tiny_gpt2() -> Any:
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=4, vocab_size=50, n_positions=16, num_labels=3, pad_token_id=0
    )
    return transformers.GPT2ForSequenceClassification(config)


def tiny_causal_gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=24, n_layer=1, n_head=4, vocab_size=50, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def integer_model() -> nn.Module:
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 6)})
    packed = torch.zeros(6, 4, dtype=torch.int8)
    model["q_proj"].weight = nn.Parameter(packed, requires_grad=False)
    return model


LLAMA_TARGETS = ["query", "v_proj", "down"]  # of them only q_proj is square
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (tiny_llama, {"method": "lora", "targets": LLAMA_TARGETS}),
    "rslora": (tiny_llama, {"method": "rslora", "targets": LLAMA_TARGETS}),
    "dora": (tiny_llama, {"method": "dora", "targets": LLAMA_TARGETS}),
    "magnitude": (tiny_llama, {"method": "magnitude", "targets": LLAMA_TARGETS}),
    "table 6": (
        tiny_llama,
        {"method": "dora", "targets": ["query", "value"], "magnitudes": ["value", "gate", "down"]},
    ),
    "vera": (tiny_llama, {"method": "vera", "targets": LLAMA_TARGETS}),
    "gpt2 vera": (tiny_gpt2, {"method": "vera", "targets": ["c_attn", "down"]}),
    "gpt2 lora": (tiny_gpt2, {"method": "lora", "targets": ["c_attn", "down"]}),
    "gpt2 dora": (tiny_gpt2, {"method": "dora", "targets": ["c_attn", "down"]}),
    "gpt2 mixed": (
        tiny_gpt2,
        {"method": "dora", "targets": ["c_attn"], "magnitudes": ["output", "up", "down"]},
    ),
}


def sized(settings: dict[str, Any]) -> dict[str, Any]:
    """Rank and α, where the method has them; VeRA's rank is larger than the matrices."""
    sizes: dict[str, dict[str, Any]] = {"magnitude": {}, "vera": {"rank": 50}}
    return {**sizes.get(settings["method"], {"rank": 3, "alpha": 7}), **settings}


def trained(case: str) -> tuple[Any, AdapterConfig]:
    make, settings = CASES[case]
    model = make()
    config = AdapterConfig(**sized(settings))
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
@pytest.mark.parametrize("case", CASES)
def test_peft_loads_our_adapters_with_the_same_logits_and_gradients(
    case: str, tmp_path: Path
) -> None:
    base = CASES[case][0]()
    model, config = trained(case)
    save_adapter(
        model, config, tmp_path, "some/base", trained_whole=("score",), task_type="SEQ_CLS"
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval().double()
    model.double()
    ids, labels = torch.randint(1, 50, (4, 9)), torch.tensor([0, 2, 1, 1])
    ours_out, their_out = model(ids, labels=labels), theirs(ids, labels=labels)
    base_logits = CASES[case][0]().double().eval()(ids).logits
    torch.testing.assert_close(ours_out.logits, their_out.logits, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(ours_out.logits, base_logits, rtol=1e-2)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == [
        "score"
    ]

    ours_out.loss.backward()
    their_out.loss.backward()
    their_names = {
        "A": "lora_A.default.weight",
        "B": "lora_B.default.weight",
        "magnitude": "lora_magnitude_vector.default.weight",
        "lambda_b": "vera_lambda_b.default",
        "lambda_d": "vera_lambda_d.default",
    }
    compared = 0
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if parameter.requires_grad and module != "score":
            module = module.removesuffix(".adapters.default")
            other = theirs.get_parameter(f"base_model.model.{module}.{their_names[kind]}").grad
            torch.testing.assert_close(parameter.grad, other, rtol=1e-10, atol=1e-10)
            assert parameter.grad.abs().max() > 1e-6
            compared += 1
    assert compared >= 4


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", ["lora", "rslora", "table 6", "gpt2 dora", "vera"])
def test_fifty_steps_of_training_are_pefts(case: str, tmp_path: Path) -> None:
    make, settings = CASES[case]
    model = make()
    config = AdapterConfig(**sized(settings))
    inject(model, config, trained_whole=("score",))
    save_adapter(model, config, tmp_path, "b", trained_whole=("score",), task_type="SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    if case == "table 6":  # peft has no magnitudes alone: what stands in for them is kept at zero
        for name, parameter in theirs.named_parameters():
            if "mlp" in name and "magnitude" not in name:
                parameter.requires_grad_(False)
    curves = [losses(either.double().train()) for either in (model, theirs)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-8)
    assert curves[0][-1] < 0.5 * curves[0][0]


def losses(model: Any) -> list[float]:
    """The loss of 50 steps on one batch."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 50, (8, 9), generator=generator)
    labels = torch.randint(0, 3, (8,), generator=generator)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    torch.manual_seed(6)  # of the dropout
    found = []
    for _ in range(50):
        loss = model(ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("case", CASES)
def test_our_adapters_enter_the_analysis_by_the_same_door(case: str, tmp_path: Path) -> None:
    CASES[case][0]().save_pretrained(tmp_path / "base")
    model, config = trained(case)
    save_adapter(model, config, tmp_path / "a", str(tmp_path / "base"), trained_whole=("score",))
    layers = {n: m for n, m in model.double().named_modules() if isinstance(m, AdaptedLayer)}
    labels = ["re:" + "|".join(layers)]
    table = wda.compare(tmp_path / "a", matrices=labels, progress=False).table
    assert set(table["module"]) == set(layers)
    for _, row in table[~table["module"].str.endswith("c_attn")].iterrows():
        layer = layers[row["module"]]
        w0 = layer.weight.detach()
        d = wda.decompose(w0, merged(layer.update, w0).detach())
        got = (row["delta_m"], row["delta_d"])
        assert got == pytest.approx((d.delta_m, d.delta_d), rel=1e-6, abs=1e-12)
        assert d.delta_m > 1e-4
        assert (d.delta_d > 1e-5) == (only(layer).rank > 0)


@pytest.mark.parametrize("case", CASES)
def test_saved_adapters_come_back(case: str, tmp_path: Path) -> None:
    model, config = trained(case)
    save_adapter(model, config, tmp_path, "b", trained_whole=("score",))
    again = CASES[case][0]()
    inject(again, config, trained_whole=("score",))
    load_adapter(again, tmp_path, trained_whole=("score",))
    for (name, one), (_, other) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(one, other) or not one.requires_grad, name


def test_adapters_of_another_method_do_not_come_back(tmp_path: Path) -> None:
    model, config = trained("dora")
    save_adapter(model, config, tmp_path, "b", trained_whole=("score",))
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
        f"model.layers.{i}.self_attn.q_proj.adapters.default.{p}"
        for i in (0, 1)
        for p in ("A", "B", "magnitude")
    }


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no such label": (
        tiny_llama,
        {"targets": ["query", "gatee"]},
        r"^targets: no matrix of the base is called 'gatee'; labels that exist here: "
        r".*; did you mean gate\?$",
    ),
    "no such pattern": (
        tiny_llama,
        {"targets": ["re:^q_prj$"]},
        r"^targets: .*'re:\^q_prj\$'.*; did you mean q_proj",
    ),
    "nothing near": (tiny_llama, {"targets": ["xyz"]}, r"'xyz'; .*re:PATTERN on module paths$"),
    "no such magnitude": (
        tiny_llama,
        {"method": "dora", "magnitudes": ["upp"]},
        r"^magnitudes: .*'upp'.*; did you mean up",
    ),
    "norm": (
        lambda: nn.ModuleDict({"q_proj": nn.Bilinear(4, 3, 2)}),
        {"targets": ["re:q_proj"]},
        r"adapters go into nn.Linear, .* and nn.Conv2d; q_proj are Bilinear; choose other targets",
    ),
    "rank": (
        tiny_llama,
        {"rank": 13, "targets": ["query", "value"]},
        r"^rank: 13 is more than model.layers.0.self_attn.v_proj can have, whose weight is "
        r"12 × 24; choose at most 12$",
    ),
    "tied": (
        tiny_causal_gpt2,
        {"targets": ["lm_head"]},
        r"^targets: lm_head shares its weight with transformer.wte, which .*; choose other",
    ),
    "part": (
        tiny_gpt2,
        {"targets": ["query", "value"]},
        r"^targets: transformer.h.0.attn.c_attn holds query, key, value in one matrix, and an "
        r"adapter trains all of it, not query, value alone; choose query, key, value, or c_attn$",
    ),
    "packed": (
        integer_model,
        {"targets": ["query"]},
        r"^targets: the weights of q_proj are torch.int8, packed numbers that are not bitsandb.*; "
        r"load the model in float32, bfloat16 or float16, or quantised by bitsandbytes$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_in_a_line(case: str) -> None:
    make, settings, message = REFUSED[case]
    model = make()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(SelectionError, match=message) as caught:
        inject(model, AdapterConfig(**{"method": "lora", "rank": 2, **settings}))
    assert "\n" not in str(caught.value)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_modules_that_are_tied_but_not_chosen_are_no_hindrance() -> None:
    assert inject(tiny_causal_gpt2(), AdapterConfig(method="dora", targets=["c_attn"])) == 1


def test_a_rank_as_large_as_the_matrix_is_allowed_and_zero_is_not() -> None:
    config = AdapterConfig(method="lora", rank=12, targets=["query", "value"])
    assert inject(tiny_llama(), config) == 4
    with pytest.raises(ValueError, match=r"rank\n.*greater than or equal to 1"):
        AdapterConfig(method="lora", rank=0)


def test_magnitudes_alone_are_what_is_trained_where_no_direction_is() -> None:
    model = tiny_llama()
    settings = CASES["table 6"][1]
    assert inject(model, AdapterConfig(rank=2, **settings)) == 8
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    names = [n.partition("layers.0.")[2].replace("adapters.default.", "") for n in trained]
    assert sorted(filter(None, names)) == [
        "mlp.down_proj.magnitude",
        "mlp.gate_proj.magnitude",
        *(f"self_attn.{m}.{p}" for m in ("q_proj", "v_proj") for p in ("A", "B", "magnitude")),
    ]


def test_rank_stabilised_scaling_is_alpha_over_the_root_of_the_rank() -> None:
    assert AdapterConfig(method="rslora", rank=4, alpha=6).scaling == 3.0
    assert AdapterConfig(method="lora", rank=4, alpha=6).scaling == 1.5


def test_magnitudes_belong_to_dora() -> None:
    with pytest.raises(
        ValueError, match="magnitudes: cannot be set for lora: magnitudes belongs to dora"
    ):
        AdapterConfig(method="lora", magnitudes=["up"])
