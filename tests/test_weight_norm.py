"""Weight normalisation: its formula, its gradients across V, and its way into the analysis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

import wda
from wda.adapters import AdapterConfig, inject, load_adapter, save_adapter
from wda.adapters.weight_norm import normalised
from wda.errors import ModelError, SelectionError
from wda.training import Recipe, train_recipe
from wda.training.watching import KeepSteps

CONFIG = AdapterConfig(method="weightnorm", targets=["query", "down"])


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"q_proj": nn.Linear(10, 6), "down_proj": nn.Linear(14, 8)}).double()


def perturbed() -> nn.ModuleDict:
    trained = model()
    assert inject(trained, CONFIG) == 2
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * parameter.abs().mean() * torch.randn_like(parameter))
    return trained


def by_hand(m: Tensor, v: Tensor) -> Tensor:
    return m * v / v.norm(dim=1, keepdim=True)


def test_weights_and_gradients_are_those_of_the_formula() -> None:
    trained = perturbed()
    (m, v), layer = normalised(trained)["q_proj"], trained["q_proj"]
    assert m.shape == (6, 1) and v.shape == (6, 10)
    x = torch.randn(4, 10, dtype=torch.float64)
    results = []
    for out in (
        layer(x),
        functional.linear(x, by_hand(*normalised(trained)["q_proj"]), layer.bias),
    ):
        results.append([out, *torch.autograd.grad(out.square().sum(), [m, v])])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)
    assert (results[0][2] * v).sum(dim=1).abs().max() < 1e-12
    learning = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert learning == {
        f"{m}.parametrizations.weight.original{i}" for m in ("q_proj", "down_proj") for i in (0, 1)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_starts_within_a_rounding_of_the_layer(dtype: torch.dtype) -> None:
    """V·(m/‖V‖) where torch computes m and ‖V‖ in two ways."""
    trained = model().to(dtype)
    w0 = trained["q_proj"].weight.detach().clone()
    inject(trained, CONFIG)
    wt = trained["q_proj"].weight
    torch.testing.assert_close(wt, w0, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_saved_it_enters_the_analysis_and_comes_back(tmp_path: Path) -> None:
    torch.save(model().state_dict(), tmp_path / "base.pt")
    trained = perturbed()
    save_adapter(trained, CONFIG, tmp_path / "a", str(tmp_path / "base.pt"))
    table = wda.compare(tmp_path / "a", matrices=["query", "down"], progress=False).table
    assert set(table["method"]) == {"weightnorm"}
    for _, row in table.iterrows():
        w0 = model()[row["module"]].weight.detach()
        d = wda.decompose(w0, trained[row["module"]].weight.detach())
        assert (row["delta_m"], row["delta_d"]) == pytest.approx((d.delta_m, d.delta_d), rel=1e-9)
    again = model()
    inject(again, CONFIG)
    load_adapter(again, tmp_path / "a")
    x = torch.randn(4, 14, dtype=torch.float64)
    assert torch.equal(again["down_proj"](x), trained["down_proj"](x))


def test_what_does_not_fit_is_refused() -> None:
    trained = perturbed()
    with pytest.raises(ModelError, match="q_proj, .* are bottlenecks or normalised already"):
        inject(trained, CONFIG)
    embedding = nn.ModuleDict({"embed_tokens": nn.Embedding(9, 4)})
    with pytest.raises(SelectionError, match="weightnorm is for linear layers; embed_tokens are"):
        inject(embedding, CONFIG.model_copy(update={"targets": ["re:embed_tokens"]}))
    assert not parametrize.is_parametrized(embedding["embed_tokens"])


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("method", ["weightnorm", "series", "parallel", "vera", "dvora"])
def test_trainings_of_other_methods_go_on_to_the_same_end(
    method: str, trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Recipe(
        base=str(trainable / "base"),
        data={"location": str(trainable / "data.csv"), "where": {"source": "a"}},
        adapter={"method": method},
        steps=8,
        keep=[4],
        learning_rate=5e-3,
        batch_size=8,
    )
    whole = train_recipe(asked, tmp_path / "whole", progress=False)
    assert 0 < whole.trainable < whole.parameters
    step_end = KeepSteps.on_step_end

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            raise StoppedError
        step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(KeepSteps, "on_step_end", interrupt)
        with pytest.raises(StoppedError):
            train_recipe(asked, tmp_path / "cut", progress=False)
    train_recipe(asked, tmp_path / "cut", resume=True, progress=False)
    name = "checkpoint-8/adapter_model.safetensors"
    ours, theirs = (load_file(tmp_path / run / name) for run in ("whole", "cut"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
