"""Adapters merged into a model in place, and taken out again to the last bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from wda.adapters import AdapterConfig, inject, load_adapter, merge, save_adapter, unmerge
from wda.adapters.layer import AdaptedLayer
from wda.callbacks import live
from wda.errors import ModelError


def adapted_gpt2(method: str, dtype: torch.dtype = torch.float64) -> tuple[Any, AdapterConfig]:
    torch.manual_seed(3)
    shape = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(shape).to(dtype).eval()
    size = {} if method == "magnitude" else {"rank": 3, "alpha": 7}
    config = AdapterConfig(method=method, targets=["c_attn", "up"], **size)
    inject(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn_like(parameter))
    return model, config


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone().view(torch.uint8) for name, t in model.state_dict().items()}


METHODS = ["lora", "rslora", "dora", "magnitude"]


@pytest.mark.parametrize("method", METHODS)
def test_merged_is_the_same_function_and_unmerged_the_same_bits(method: str) -> None:
    model, _ = adapted_gpt2(method)
    ids = torch.randint(0, 50, (2, 9))
    before, state = model(ids).logits, bits(model)
    assert merge(model) == 4
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-11, atol=1e-12)
    changed = {name for name, t in bits(model).items() if not torch.equal(t, state[name])}
    assert changed == {
        f"transformer.h.{i}.{m}.base_layer.weight"
        for i in (0, 1)
        for m in ("attn.c_attn", "mlp.c_fc")
    }
    assert unmerge(model) == 4
    assert all(torch.equal(t, state[name]) for name, t in bits(model).items())
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("method", METHODS)
def test_bits_come_back_in_half_precision_and_after_many_times(method: str) -> None:
    """Adding and subtracting B·A would drift; the merged weight is Wt rounded once."""
    model, _ = adapted_gpt2(method, torch.bfloat16)
    state = bits(model)
    exact = copy.deepcopy(model).double()
    merge(exact)
    for _ in range(3):
        merge(model)
        layer = model.transformer.h[0].mlp.c_fc
        wanted = exact.transformer.h[0].mlp.c_fc.weight.bfloat16()
        assert torch.equal(layer.weight, wanted)
        unmerge(model)
    assert all(torch.equal(t, state[name]) for name, t in bits(model).items())


def test_an_odd_number_comes_back_too() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 6)})
    with torch.no_grad():
        model["q_proj"].weight[0] = torch.tensor([-0.0, torch.nan, torch.inf, 1e-45])
    state = bits(model)
    inject(model, AdapterConfig(method="lora", rank=2, targets=["query"]))
    merge(model)
    unmerge(model)
    assert torch.equal(bits(model)["q_proj.base_layer.weight"], state["q_proj.weight"])


def test_merging_out_of_turn_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model, config = adapted_gpt2("dora")
    with pytest.raises(ModelError, match=r"c_attn, .* are not merged, so there is nothing"):
        unmerge(model)
    with pytest.raises(ModelError, match="has no adapters; put them in with"):
        merge(nn.Linear(2, 2))
    save_adapter(model, config, tmp_path, "base")
    merge(model)
    state = bits(model)
    with pytest.raises(ModelError, match=r"are merged already; merging twice would count"):
        merge(model)
    with pytest.raises(ModelError, match=r"are merged, and those of a file would change nothing"):
        load_adapter(model, tmp_path)
    with pytest.raises(ModelError, match="its adapter is merged; it is measured while"):
        live.find_weights(model)
    assert all(torch.equal(t, state[name]) for name, t in bits(model).items())


def test_merged_adapters_cannot_be_trained_but_can_be_evaluated() -> None:
    model, _ = adapted_gpt2("dora")
    merge(model)
    model.train()
    ids = torch.randint(0, 50, (1, 4))
    with pytest.raises(ModelError, match=r"are merged and cannot be trained so; call"):
        model(ids)
    with torch.no_grad():
        model(ids)
    assert all(m.is_merged for m in model.modules() if isinstance(m, AdaptedLayer))
