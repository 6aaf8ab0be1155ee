"""DVoRA, DoRA per input feature and several adapters: what peft does not know, by Eq. 5 itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted import adapt, only, perturb
from torch import Tensor, nn
from torch.nn import functional

import wda
from wda.adapters import (
    AdaptedLayer,
    AdapterConfig,
    VeRA,
    activate,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from wda.checkpoints import open_checkpoint
from wda.errors import ModelError, SelectionError
from wda.updates import merged

OUT, IN = 6, 10

Method = tuple[str, dict[str, Any]]

METHODS: dict[str, Method] = {
    "vera": ("vera", {"rank": 20}),
    "dvora": ("dvora", {"rank": 20}),
    "dvora, full gradient": ("dvora", {"rank": 20, "full_gradient": True}),
    "per input": ("dora", {"rank": 3, "alpha": 7, "per": "input"}),
    "per input, full gradient": (
        "dora",
        {"rank": 3, "alpha": 7, "per": "input", "full_gradient": True},
    ),
}


def trained_layer(case: str) -> AdaptedLayer:
    torch.manual_seed(0)
    method, settings = METHODS[case]
    layer = adapt(nn.Linear(IN, OUT).double(), method, **settings)
    perturb(layer)
    return layer


def weight_of(layer: AdaptedLayer) -> Tensor:
    """Wt by the plain formula, with ‖V‖ held constant unless the full gradient is asked for."""
    adapter, config = only(layer), layer.configs["default"]
    if isinstance(adapter, VeRA):
        A, B = adapter.projections.A[:, :IN], adapter.projections.B[:OUT]
        delta = torch.diag(adapter.lambda_b) @ B @ torch.diag(adapter.lambda_d) @ A
    else:
        delta = 7 / 3 * adapter.B @ adapter.A
    v = layer.base_layer.weight + delta
    if adapter.magnitude is None:
        return v
    norm = v.norm(dim=0 if config.per == "input" else 1)
    scale = adapter.magnitude / (norm if config.full_gradient else norm.detach())
    return v * scale if config.per == "input" else scale[:, None] * v


@pytest.mark.parametrize("case", METHODS)
def test_forward_and_gradients_are_those_of_the_formula(case: str) -> None:
    layer = trained_layer(case)
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    trained = [p for p in layer.parameters() if p.requires_grad]
    results = []
    for out in (layer(x), functional.linear(x, weight_of(layer), layer.base_layer.bias)):
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        loss = (weights * out.square()).sum()
        results.append([out, *torch.autograd.grad(loss, [x, *trained])])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    assert all(gradient.abs().max() > 1e-6 for gradient in results[0])


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_the_layer_to_the_last_bit(case: str, dtype: torch.dtype) -> None:
    method, settings = METHODS[case]
    linear = nn.Linear(IN, OUT).to(dtype)
    x = torch.randn(5, 7, IN, dtype=dtype)
    expected = linear(x)
    assert torch.equal(adapt(linear, method, **settings)(x), expected)


@pytest.mark.parametrize("case", METHODS)
def test_merged_it_is_the_same_function_and_unmerged_the_same_bits(case: str) -> None:
    layer = trained_layer(case)
    x = torch.randn(4, IN, dtype=torch.float64)
    w0, wt, apart = layer.weight.clone(), weight_of(layer), layer(x)
    merge(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), apart, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(layer.weight, wt, rtol=1e-11, atol=1e-12)
    unmerge(layer)
    assert torch.equal(layer.weight, w0)


def two_layers() -> nn.Module:
    """A model whose matrices differ in both sizes."""
    torch.manual_seed(0)
    return nn.ModuleDict({"q_proj": nn.Linear(10, 6), "down_proj": nn.Linear(14, 8)}).double()


def test_projections_are_shared_and_cut_to_each_layer() -> None:
    model = two_layers()
    inject(model, AdapterConfig(method="dvora", rank=5, targets=["query", "down"]))
    for moved in (model, copy.deepcopy(model), copy.deepcopy(model).float()):
        adapters = [only(layer) for layer in moved.children()]
        assert adapters[0].projections is adapters[1].projections
        assert adapters[0].projections.A.shape == (5, 14)
        assert adapters[0].projections.B.shape == (8, 5)
        assert adapters[0].update.A.shape == (5, 10)
        assert not any("projections" in name for name in moved.state_dict())
    bound = (6 / 14) ** 0.5  # Kaiming for a ReLU: uniform with variance 2/in
    assert 0.5 * bound < adapters[0].projections.A.abs().max() <= bound


def test_a_frozen_product_is_computed_once_until_w0_or_a_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = trained_layer("dvora")
    layer.train()
    x = torch.randn(4, IN, dtype=torch.float64)

    def step() -> None:
        torch.testing.assert_close(
            layer(x),
            functional.linear(x, weight_of(layer), layer.base_layer.bias),
            rtol=1e-12,
            atol=1e-12,
        )

    step()
    with torch.no_grad():
        only(layer).lambda_d.mul_(1.5)
    step()
    with torch.no_grad():
        only(layer).projections.A.mul_(0.5)
    step()
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)
    step()


@pytest.mark.parametrize("case", ["dvora", "per input", "per input, full gradient"])
def test_saved_they_enter_the_analysis_and_come_back(case: str, tmp_path: Path) -> None:
    method, settings = METHODS[case]
    model = two_layers()
    config = AdapterConfig(method=method, targets=["query", "down"], **settings)
    torch.save(model.state_dict(), tmp_path / "base.pt")
    inject(model, config)
    perturb(model)
    save_adapter(model, config, tmp_path / "a", str(tmp_path / "base.pt"))
    result = wda.compare(tmp_path / "a", matrices=["query", "down"], progress=False)
    assert set(result.table["method"]) == {method}
    for _, row in result.table.iterrows():
        layer = model.get_submodule(row["module"])
        w0 = layer.weight.detach()
        d = wda.decompose(w0, merged(layer.update, w0).detach())
        got = (row["delta_m"], row["delta_d"])
        assert got == pytest.approx((d.delta_m, d.delta_d), rel=1e-9)
    again = two_layers()
    torch.manual_seed(8)  # other projections than those of the file
    inject(again, config)
    load_adapter(again, tmp_path / "a")
    x = torch.randn(3, 10, dtype=torch.float64)
    torch.testing.assert_close(again["q_proj"](x), model["q_proj"](x), rtol=1e-13, atol=1e-13)
    with pytest.raises((ValueError, KeyError)):
        peft.PeftModel.from_pretrained(two_layers(), tmp_path / "a")


def test_magnitudes_beside_dvora_are_read_back(tmp_path: Path) -> None:
    model = two_layers()
    config = AdapterConfig(method="dvora", rank=4, targets=["query"], magnitudes=["down"])
    torch.save(model.state_dict(), tmp_path / "base.pt")
    assert inject(model, config) == 2
    perturb(model)
    save_adapter(model, config, tmp_path / "a", str(tmp_path / "base.pt"))
    table = wda.compare(tmp_path / "a", matrices=["query", "down"], progress=False).table
    assert (table["delta_m"] > 1e-3).all()
    assert dict(zip(table["matrix"], table["delta_d"] > 1e-6, strict=True)) == {
        "query": True,
        "down": False,
    }
    assert open_checkpoint(tmp_path / "a").method == "dvora"


SEVERAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({"method": "lora", "rank": 2}, {"method": "rslora", "rank": 3, "alpha": 5}),
    "dora": ({"method": "dora", "rank": 2}, {"method": "dora", "rank": 3, "alpha": 5}),
    "dora and dvora": ({"method": "dora", "rank": 2}, {"method": "dvora", "rank": 12}),
    "dora and magnitude": ({"method": "dora", "rank": 2}, {"method": "magnitude"}),
}


def model_of_two(case: str) -> tuple[nn.Module, list[AdapterConfig]]:
    """A model with adapters a (of both layers) and b (of one)."""
    first, second = SEVERAL[case]
    configs = [
        AdapterConfig(targets=["query", "down"], **first),
        AdapterConfig(targets=["query"], **second),
    ]
    model = two_layers()
    for name, config in zip("ab", configs, strict=True):
        inject(model, config, name=name)
        perturb(model)
    return model, configs


@pytest.mark.parametrize("case", SEVERAL)
def test_several_adapters_add_up_in_any_order_and_merge_to_what_they_do(case: str) -> None:
    """V = W0 + Σ s·B·A and m = ‖W0‖ + Σ (m_i − ‖W0‖)."""
    model, configs = model_of_two(case)
    layer = model["q_proj"]
    w0 = layer.weight.detach()
    x = torch.randn(4, 10, dtype=torch.float64)
    v, m = w0.clone(), w0.norm(dim=1)
    for name in "ab":
        adapter = layer.adapters[name]
        v += adapter.update.scaling * (adapter.update.B @ adapter.update.A).detach()
        if adapter.magnitude is not None:
            m += adapter.magnitude.detach() - w0.norm(dim=1)
    wt = m[:, None] * v / v.norm(dim=1, keepdim=True) if configs[0].decomposed else v
    expected = functional.linear(x, wt, layer.base_layer.bias)
    for order in (("a", "b"), ("b", "a")):
        activate(model, *order)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    merge(model)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", SEVERAL)
def test_one_of_several_is_what_it_is_alone(case: str, tmp_path: Path) -> None:
    model, configs = model_of_two(case)
    model.eval()
    x = torch.randn(4, 10, dtype=torch.float64)
    for name, config in zip("ab", configs, strict=True):
        activate(model, name)
        save_adapter(model, config, tmp_path / name, "base", name=name)
        alone = two_layers()
        inject(alone, config, name="other")
        load_adapter(alone, tmp_path / name, name="other")
        assert torch.equal(model["q_proj"](x), alone.eval()["q_proj"](x))
    activate(model)
    assert torch.equal(model["q_proj"](x), two_layers()["q_proj"](x))


def test_the_newest_adapter_alone_takes_part_and_is_trained() -> None:
    model, _ = model_of_two("dora")
    assert [layer.active for layer in model.children()] == [("b",), ()]
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"q_proj.adapters.b.{part}" for part in ("A", "B", "magnitude")}
    activate(model, "a", "b")
    model["q_proj"](torch.randn(2, 10).double()).sum().backward()
    assert model["q_proj"].adapters["b"].A.grad is not None
    assert model["q_proj"].adapters["a"].A.grad is None


def test_what_one_adapter_kept_is_not_anothers() -> None:
    """In evaluation κ is kept; another choice, or the same made again, starts anew."""
    model, _ = model_of_two("dora")
    model.eval().requires_grad_(False)
    x = torch.randn(2, 10, dtype=torch.float64)
    for names in ("a", "b", "ab", "a", "", "ba", "b"):
        activate(model, *names)
        fresh, _ = model_of_two("dora")
        activate(fresh, *names)
        for _ in range(2):
            assert torch.equal(model["q_proj"](x), fresh.train()["q_proj"](x))


def lora_beside_dora(model: nn.Module) -> None:
    inject(model, AdapterConfig(method="lora", rank=2, targets=["query"]), name="c")
    activate(model, "a", "c")


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "name taken": (
        lambda model: inject(model, AdapterConfig(method="lora", targets=["query"]), name="a"),
        r"^name: the model has an adapter called 'a'; choose another name$",
    ),
    "no such name": (
        lambda model: activate(model, "a", "x"),
        r"^names: the model has no adapter called x; it has a, b$",
    ),
    "mixed": (lora_beside_dora, r"^names: a, c meet in q_proj and change the weight in different"),
    "merged": (
        lambda model: (merge(model), activate(model, "a")),
        r"are merged, and others cannot take their place; call wda.adapters.unmerge",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_in_a_line(case: str) -> None:
    act, message = REFUSED[case]
    model, _ = model_of_two("dora")
    with pytest.raises(ModelError, match=message) as caught:
        act(model)
    assert "\n" not in str(caught.value)


def test_magnitudes_of_input_features_are_for_linear_layers() -> None:
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(9, 4)})
    config = AdapterConfig(method="dora", rank=2, per="input", targets=["re:embed_tokens"])
    with pytest.raises(SelectionError, match="is for linear layers; embed_tokens are not"):
        inject(model, config)


def test_dropout_keeps_the_mean_and_ends_with_training() -> None:
    torch.manual_seed(0)
    layer = adapt(nn.Linear(IN, OUT).double(), "dora", rank=3, alpha=7, dropout=0.25)
    perturb(layer)
    x = torch.randn(1, IN, dtype=torch.float64)
    expected = layer.eval()(x)
    torch.testing.assert_close(
        expected, functional.linear(x, weight_of(layer), layer.base_layer.bias)
    )
    outs = torch.stack([layer.train()(x).detach() for _ in range(4000)])
    assert outs.std(dim=0).min() > 1e-3
    torch.testing.assert_close(outs.mean(dim=0), expected, rtol=0.02, atol=0.02)
