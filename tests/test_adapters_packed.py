"""Adapters on bases that bitsandbytes packed: against the unpacked weight, and against peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted import only, perturb
from torch import Tensor, nn

import wda
from wda.adapters import AdapterConfig, inject, merge, packed, save_adapter
from wda.adapters.packed import FrozenPacked
from wda.errors import ModelError

bnb = pytest.importorskip("bitsandbytes")

# Rows of 128 are cut into whole blocks of 64 numbers; rows of 96 are not.
SHAPES = {"q_proj": (48, 128), "down_proj": (80, 96)}
PACKINGS = ["nf4", "nf4, nested", "int8"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 3, "alpha": 7},
    "dora": {"method": "dora", "rank": 3, "alpha": 7},
    "dora, full gradient": {"method": "dora", "rank": 3, "alpha": 7, "full_gradient": True},
    "magnitude": {"method": "magnitude"},
    "dvora": {"method": "dvora", "rank": 30},
}


def plain() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(i, o) for name, (o, i) in SHAPES.items()})


def packed_model(packing: str) -> nn.ModuleDict:
    model = nn.ModuleDict()
    for name, linear in plain().items():
        if packing == "int8":
            layer = bnb.nn.Linear8bitLt(
                linear.in_features, linear.out_features, has_fp16_weights=False
            )
        else:
            layer = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                compute_dtype=torch.float32,
                quant_type="nf4",
                compress_statistics="nested" in packing,
            )
        layer.load_state_dict(linear.state_dict())
        model[name] = layer.to("cpu")
    return model


def unpacked(model: nn.ModuleDict) -> nn.ModuleDict:
    """The same model, with what the packed numbers stand for, unpacked by bitsandbytes itself."""
    other = plain()
    for name, layer in model.items():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        else:
            weight = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        other[name].weight.data.copy_(weight)
    return other


def outcome(model: nn.ModuleDict, name: str) -> list[Tensor]:
    torch.manual_seed(2)
    x = torch.randn(5, SHAPES[name][1], requires_grad=True)
    out = model[name](x)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    trained = [p for p in model[name].parameters() if p.requires_grad]
    return [out, *torch.autograd.grad((weights * out.square()).sum(), [x, *trained])]


@pytest.mark.parametrize("block", [2**22, 640])
@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_are_what_bitsandbytes_unpacks(
    packing: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks, too, whose squares and products are those of the whole."""
    monkeypatch.setattr(packed, "_BLOCK", block)
    model = packed_model(packing)
    expected = unpacked(model)
    inject(model, AdapterConfig(method="dora", rank=3, targets=["query", "down"]))
    for name, layer in model.items():
        frozen, w0 = layer.frozen, expected[name].weight.detach()
        assert isinstance(frozen, FrozenPacked)
        assert frozen.shape == SHAPES[name]
        blocks = list(frozen.blocks())
        assert (len(blocks) > 1) == (block == 640)
        together = torch.cat([rows for _, rows in blocks])
        torch.testing.assert_close(together, w0, rtol=1e-6, atol=0)
        for dim in (0, 1):
            torch.testing.assert_close(frozen.squares(dim), w0.square().sum(dim=dim))
        A = torch.randn(3, SHAPES[name][1], requires_grad=True)
        g = torch.randn(SHAPES[name][0], 3)
        torch.testing.assert_close(frozen.projected(A), w0 @ A.T)
        (found,) = torch.autograd.grad(frozen.projected(A), A, g)
        torch.testing.assert_close(found, g.T @ w0)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("case", METHODS)
def test_packed_it_trains_as_on_the_unpacked_weight(case: str, packing: str) -> None:
    config = AdapterConfig(targets=["query", "down"], **METHODS[case])
    model = packed_model(packing)
    other = unpacked(model)
    for either in (model, other):
        torch.manual_seed(3)
        inject(either, config)
        perturb(either)
    # bitsandbytes multiplies int8 by activations that it rounds to eight bits, too.
    tolerance = 0.03 if packing == "int8" else 2e-5
    for name in SHAPES:
        for got, wanted in zip(outcome(model, name), outcome(other, name), strict=True):
            assert (got - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("packing", PACKINGS)
def test_starts_as_the_packed_layer_to_the_last_bit(packing: str) -> None:
    model = packed_model(packing)
    x = torch.randn(5, 128)
    before = model["q_proj"](x)
    inject(model, AdapterConfig(method="dora", rank=3, targets=["query"]))
    assert torch.equal(model["q_proj"](x), before)
    assert {p.dtype for p in only(model["q_proj"]).parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", ["lora", "dora"])
def test_peft_trains_the_same_on_four_bits(case: str, tmp_path: Path) -> None:
    config = AdapterConfig(targets=["query", "down"], **METHODS[case])
    model = packed_model("nf4")
    inject(model, config)
    perturb(model)
    save_adapter(model, config, tmp_path / "a", "base")
    base = packed_model("nf4")
    base.is_loaded_in_4bit = True
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a", is_trainable=True)
    layers = theirs.base_model.model
    for name in SHAPES:
        found, expected = outcome(model, name), outcome(layers, name)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
        ours = sorted(float(g.norm()) for g in found[2:])
        assert ours == pytest.approx(sorted(float(g.norm()) for g in expected[2:]), rel=1e-4)


def test_it_enters_the_analysis_against_what_is_packed(tmp_path: Path) -> None:
    model = packed_model("nf4")
    torch.save(unpacked(model).state_dict(), tmp_path / "base.pt")
    config = AdapterConfig(targets=["query", "down"], **METHODS["dora"])
    inject(model, config)
    perturb(model)
    save_adapter(model, config, tmp_path / "a", str(tmp_path / "base.pt"))
    table = wda.compare(tmp_path / "a", matrices=["query", "down"], progress=False).table
    for _, row in table.iterrows():
        adapter, w0 = only(model[row["module"]]), unpacked(model_of(model))[row["module"]].weight
        v = w0 + 7 / 3 * adapter.B @ adapter.A
        wt = adapter.magnitude[:, None] * v / v.norm(dim=1, keepdim=True)
        d = wda.decompose(w0.detach().double(), wt.detach().double())
        assert (row["delta_m"], row["delta_d"]) == pytest.approx((d.delta_m, d.delta_d), rel=1e-4)


def model_of(model: nn.ModuleDict) -> nn.ModuleDict:
    """The packed layers without their adapters."""
    return nn.ModuleDict({name: layer.base_layer for name, layer in model.items()})


def test_merging_into_packed_weights_is_refused() -> None:
    model = packed_model("nf4")
    inject(model, AdapterConfig(method="dora", rank=3, targets=["query"]))
    with pytest.raises(ModelError, match="the weights of q_proj are packed, .*`wda merge ADAPTER"):
        merge(model)
