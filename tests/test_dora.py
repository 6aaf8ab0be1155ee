"""DoRA's own properties: Eq. 5 and its gradients by autograd, precision, what is kept."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted import adapt, only
from torch import Tensor, nn
from torch.nn import functional

from wda.adapters import AdaptedLayer
from wda.updates import inner_products

OUT, IN, RANK, ALPHA = 6, 10, 3, 7


def dora(linear: nn.Module, full_gradient: bool = False) -> AdaptedLayer:
    return adapt(linear, "dora", rank=RANK, alpha=ALPHA, full_gradient=full_gradient)


def trained_layer(full_gradient: bool = False, dtype: torch.dtype = torch.float64) -> AdaptedLayer:
    torch.manual_seed(0)
    layer = dora(nn.Linear(IN, OUT).to(dtype), full_gradient)
    with torch.no_grad():
        only(layer).B.copy_(0.1 * torch.randn(OUT, RANK))
        only(layer).magnitude.mul_(1 + 0.2 * torch.randn(OUT))
    return layer


def direction(layer: AdaptedLayer) -> Tensor:
    return layer.weight + ALPHA / RANK * only(layer).B @ only(layer).A


def weight_of(layer: AdaptedLayer) -> Tensor:
    """Wt by Eq. 5."""
    v = direction(layer)
    return only(layer).magnitude[:, None] * v / v.norm(dim=1, keepdim=True)


def gradients(out: Tensor, layer: AdaptedLayer) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    adapter = only(layer)
    trained = (adapter.A, adapter.B, adapter.magnitude)
    return torch.autograd.grad((weights * out.square()).sum(), trained)


@pytest.mark.parametrize("full_gradient", [True, False])
def test_gradients_are_those_of_equation_5(full_gradient: bool) -> None:
    """Plain autograd of m·V/‖V‖, with ‖V‖ held constant unless the full gradient is asked for."""
    layer = trained_layer(full_gradient)
    x = torch.randn(4, IN, dtype=torch.float64)
    v = direction(layer)
    norm = v.norm(dim=1, keepdim=True)
    weight = only(layer).magnitude[:, None] * v / (norm if full_gradient else norm.detach())
    expected = gradients(functional.linear(x, weight, layer.base_layer.bias), layer)
    for got, wanted in zip(gradients(layer(x), layer), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


def test_the_two_gradients_differ_and_only_the_full_one_is_across_v() -> None:
    """⟨∇V', V'⟩ = 0 per vector; with orthonormal A that span V, ∇B is s·∇V'·Aᵀ."""
    x, along = torch.randn(4, IN, dtype=torch.float64), {}
    for full_gradient in (True, False):
        linear = nn.Linear(IN, OUT).double()
        layer = adapt(linear, "dora", rank=OUT, alpha=OUT, full_gradient=full_gradient)
        A = torch.linalg.qr(torch.randn(IN, OUT).double()).Q.T
        with torch.no_grad():
            linear.weight.copy_(torch.randn(OUT, OUT).double() @ A)
            only(layer).A.copy_(A)
            only(layer).B.copy_(0.1 * torch.randn(OUT, OUT))
        _, grad_b, _ = gradients(layer(x), layer)
        v = linear.weight @ A.T + only(layer).B  # V in the coordinates of A's rows
        along[full_gradient] = (grad_b * v).sum(dim=1).abs()
    assert along[True].max() < 1e-13
    assert along[False].min() > 1e-3


def test_half_precision_keeps_what_the_naive_form_loses() -> None:
    torch.manual_seed(0)
    exact = adapt(nn.Linear(256, 192), "dora", rank=8, alpha=16)
    with torch.no_grad():
        only(exact).B.normal_(std=0.002)
        only(exact).magnitude.mul_(1 + 0.002 * torch.randn(192))
    half = adapt(nn.Linear(256, 192).bfloat16(), "dora", rank=8, alpha=16)
    half.load_state_dict(exact.state_dict())
    exact.load_state_dict(half.state_dict())  # the same numbers, rounded once
    exact.double()
    x = torch.randn(64, 256).bfloat16()
    exact.requires_grad_(False)
    half.requires_grad_(False)
    base, adapter = half.base_layer, only(half)
    low_rank = 2.0 * functional.linear(functional.linear(x, adapter.A), adapter.B)
    norm = (base.weight + 2.0 * adapter.B @ adapter.A).norm(dim=1)
    scale = (adapter.magnitude / norm).bfloat16()
    naive = scale * (functional.linear(x, base.weight) + low_rank) + base.bias
    change = exact(x.double()) - exact.base_layer(x.double())

    def error(out: Tensor) -> float:
        """The error of what the adapter changes: what both forms add to the frozen output."""
        return float((out.double() - base(x).double() - change).norm() / change.norm())

    assert adapter.magnitude.dtype == torch.float32
    assert error(half(x)) < error(naive) / 2


@pytest.mark.parametrize("full_gradient", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_starts_as_the_layer_it_wraps_in_every_precision(
    dtype: torch.dtype, full_gradient: bool
) -> None:
    linear = nn.Linear(IN, OUT).to(dtype)
    x = torch.randn(7, IN, dtype=dtype)
    assert torch.equal(dora(linear, full_gradient)(x), linear(x))


@pytest.mark.parametrize("full_gradient", [True, False])
def test_a_row_of_zeros_stays_one_and_spoils_nothing(full_gradient: bool) -> None:
    linear = nn.Linear(IN, OUT).double()
    with torch.no_grad():
        linear.weight[2] = 0
    layer = dora(linear, full_gradient)
    out = layer(torch.randn(4, IN, dtype=torch.float64))
    assert torch.equal(out[:, 2], linear.bias[2].expand(4))
    for gradient in gradients(out, layer):
        assert gradient.isfinite().all()


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time that ‖V‖ is computed."""
    computed: list[int] = []

    def counted(*args: Any) -> tuple[Tensor, Tensor]:
        computed.append(1)
        return inner_products(*args)

    monkeypatch.setattr("wda.adapters.dora.inner_products", counted)
    return computed


def frozen_copy(layer: AdaptedLayer) -> AdaptedLayer:
    """A layer that has kept nothing yet."""
    copied = dora(copy.deepcopy(layer.base_layer))
    copied.load_state_dict(layer.state_dict())
    return copied.eval()


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_the_scale_is_computed_once_until_a_parameter_changes(
    guard: Callable[[], Any], norms: list[int]
) -> None:
    layer = trained_layer().eval()
    other = {name: t * 1.5 for name, t in layer.state_dict().items()}
    x = torch.randn(4, IN, dtype=torch.float64)

    def step(names: str) -> None:
        """An optimiser's step on some parameters, without leaving the evaluation mode."""
        chosen = [layer.get_parameter(f"adapters.default.{name}") for name in names.split()]
        for parameter in chosen:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(chosen, lr=0.1).step()

    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: step("A"),
        lambda: step("B"),
        lambda: step("magnitude"),
        lambda: layer.load_state_dict(other),
        lambda: layer.train().eval(),
    ]
    for change in changes:
        change()
        norms.clear()
        with guard():
            outs = [layer(x) for _ in range(5)]
        assert len(norms) == 1
        expected = frozen_copy(layer)(x)
        assert all(torch.equal(out, expected) for out in outs)
    layer.float()
    with guard():
        assert layer(x.float()).dtype == torch.float32


def test_training_computes_the_scale_anew(norms: list[int]) -> None:
    layer = trained_layer()
    x = torch.randn(4, IN, dtype=torch.float64)
    norms.clear()
    with torch.no_grad():
        layer(x)
        layer(x)
    layer(x)
    assert len(norms) == 3


@pytest.mark.parametrize("full_gradient", [True, False])
def test_what_evaluation_kept_does_not_end_in_gradients(full_gradient: bool) -> None:
    """Gradients in evaluation mode, and for the input after a run in inference mode."""
    x = torch.randn(4, IN, dtype=torch.float64)
    fresh = trained_layer(full_gradient)
    expected = gradients(fresh(x), fresh)
    layer = trained_layer(full_gradient).eval()
    with torch.inference_mode():
        layer(x)
    for got, wanted in zip(gradients(layer(x), layer), expected, strict=True):
        assert torch.equal(got, wanted)
    layer.requires_grad_(False)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(grad, weight_of(layer).sum(dim=0).expand(4, IN))


def test_compiled_without_a_break() -> None:
    """In a process of its own, for the shape checks of the tests cannot be compiled."""
    code = """
import torch
from wda.adapters import AdapterConfig, inject
x = torch.randn(4, 10, dtype=torch.float64)
for full_gradient in (True, False):
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(10, 6).double()})
    config = AdapterConfig(method="dora", rank=3, alpha=6, full_gradient=full_gradient)
    inject(model, config.model_copy(update={"targets": ["q_proj"]}))
    layer = model["q_proj"]
    torch.nn.init.normal_(layer.adapters["default"].B)
    for training in (True, False):
        layer.train(training)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-13, atol=1e-13)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-13, atol=1e-13)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
