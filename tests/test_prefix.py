"""Prefix tuning by PEFT behind wda's own door: what is trained, saved, refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapted import tiny_llama
from torch import Tensor

import wda
from wda.adapters import AdapterConfig, inject, load_adapter, merge, save_adapter, with_prefix
from wda.adapters.prefix import has_prefix
from wda.errors import CheckpointError, MissingExtraError, ModelError
from wda.training import Recipe

CONFIG = AdapterConfig(method="prefix", virtual_tokens=5)
IDS = torch.randint(2, 50, (4, 9), generator=torch.Generator().manual_seed(1))


def test_other_models_of_peft_have_no_prefix() -> None:
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig())
    assert not has_prefix(theirs) and not has_prefix(theirs.base_model)


def classifier() -> Any:
    return tiny_llama(transformers.LlamaForSequenceClassification)


def seq2seq() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, vocab_size=50
    )
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


MODELS: dict[str, Any] = {"CAUSAL_LM": tiny_llama, "SEQ_CLS": classifier, "SEQ_2_SEQ_LM": seq2seq}


def labels(task: str) -> Tensor:
    return torch.tensor([0, 2, 1, 1]) if task == "SEQ_CLS" else IDS


def trained(task: str) -> Any:
    """Three steps of training."""
    whole = ("score",) if task == "SEQ_CLS" else ()
    model = with_prefix(MODELS[task](), CONFIG, task, trained_whole=whole)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimiser.zero_grad()
        model(input_ids=IDS, labels=labels(task)).loss.backward()
        optimiser.step()
    return model.eval()


@pytest.mark.parametrize("task", MODELS)
def test_what_is_trained_is_saved_and_comes_back(task: str, tmp_path: Path) -> None:
    whole = ("score",) if task == "SEQ_CLS" else ()
    model = trained(task)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    head = {"base_model.score.modules_to_save.default.weight"} if whole else set()
    assert learning == {"prompt_encoder.default.embedding.weight", *head}
    save_adapter(model, CONFIG, tmp_path / "a", "some/base", whole, task)
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (said["peft_type"], said["base_model_name_or_path"]) == ("PREFIX_TUNING", "some/base")

    again = with_prefix(MODELS[task](), CONFIG, task, trained_whole=whole)
    load_adapter(again, tmp_path / "a", whole)
    theirs = peft.PeftModel.from_pretrained(MODELS[task](), tmp_path / "a")
    wanted = model(input_ids=IDS, labels=labels(task)).logits
    for other in (again, theirs):
        assert torch.equal(other.eval()(input_ids=IDS, labels=labels(task)).logits, wanted)
    base = MODELS[task]().eval()(input_ids=IDS, labels=labels(task)).logits
    assert not torch.allclose(wanted, base, rtol=1e-2)


def test_other_modules_are_trained_whole_too() -> None:
    shape = transformers.BertConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    bert = transformers.BertForSequenceClassification(shape)
    model = with_prefix(bert, CONFIG, "SEQ_CLS", ("classifier", "bert.pooler"))
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {
        "prompt_encoder.default.embedding.weight",
        *(
            f"base_model.{module}.modules_to_save.default{part}"
            for module, part in (("classifier", ""), ("bert.pooler", ".dense"))
            for part in (f"{part}.weight", f"{part}.bias")
        ),
    }


def test_every_layer_attends_to_the_virtual_tokens() -> None:
    """By transformers alone: the same keys and values handed over as a cache."""
    model = trained("CAUSAL_LM").double()
    keys_and_values = model.prompt_encoder["default"].embedding.weight.detach()
    parts = keys_and_values.view(5, 4, 2, 6).permute(1, 2, 0, 3)  # (layer and kind, head, token)
    cache = transformers.DynamicCache()
    for layer in (0, 1):
        key, value = (parts[2 * layer + kind].expand(4, -1, -1, -1) for kind in (0, 1))
        cache.update(key, value, layer)
    expected = (
        tiny_llama()
        .double()
        .eval()(
            input_ids=IDS, past_key_values=cache, attention_mask=torch.ones(4, 5 + IDS.shape[1])
        )
    )
    got = model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-12, atol=1e-13)


def test_shares_of_trained_parameters_are_the_papers() -> None:
    """30 tokens in 32 layers of LLaMA-7B: 30 · 32 · 2 · 4096 of 6738 million numbers, 0.11 %."""
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000}
    config = transformers.LlamaConfig(num_hidden_layers=32, num_attention_heads=32, **shape)
    with torch.device("meta"):
        model = with_prefix(
            transformers.LlamaForCausalLM(config), AdapterConfig(method="prefix"), "CAUSAL_LM"
        )
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    assert sum(n for n, learns in counts if learns) == 30 * 32 * 2 * 4096
    share = 100 * sum(n for n, learns in counts if learns) / sum(n for n, _ in counts)
    assert share == pytest.approx(0.1166, abs=5e-5)


def test_there_is_nothing_to_compare_or_merge(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = trained("CAUSAL_LM")
    save_adapter(model, CONFIG, tmp_path / "a", str(tmp_path / "base"))
    with pytest.raises(CheckpointError, match="prefix_tuning adapters stand beside the weights"):
        wda.compare(tmp_path / "a", progress=False)
    with pytest.raises(ModelError, match="has no adapters"):
        merge(model)


def test_what_does_not_fit_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"^method: prefix puts a model into another .* use wda"):
        inject(tiny_llama(), CONFIG)
    with pytest.raises(ValueError, match="targets: cannot be set for prefix: targets belongs to"):
        AdapterConfig(method="prefix", targets=["query"])
    with pytest.raises(ValueError, match="virtual_tokens: cannot be set for lora"):
        AdapterConfig(method="lora", virtual_tokens=4)
    with pytest.raises(ValueError, match=r"virtual_tokens\n.*greater than or equal to 1"):
        AdapterConfig(method="prefix", virtual_tokens=0)
    shape = transformers.DistilBertConfig(dim=24, n_layers=1, n_heads=2, hidden_dim=8)
    other = transformers.DistilBertForSequenceClassification(shape)
    with pytest.raises(ModelError, match=r"before the texts of a DistilBertFor.*token_dim.*other"):
        with_prefix(other, CONFIG, "SEQ_CLS")
    shape = transformers.GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=9, n_positions=5)
    with pytest.raises(ModelError, match=r"^virtual_tokens: 5 leave no place .* has 5 positions"):
        with_prefix(transformers.GPT2LMHeadModel(shape), CONFIG, "CAUSAL_LM")
    recomputing = tiny_llama()
    recomputing.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="does not work with gradient checkpointing"):
        with_prefix(recomputing, CONFIG, "CAUSAL_LM")
    with pytest.raises(ValueError, match="gradient_checkpointing: computes layers again without"):
        Recipe(
            base="b", data={"location": "d"}, adapter=CONFIG, steps=1, gradient_checkpointing=True
        )
    save_adapter(trained("CAUSAL_LM"), CONFIG, tmp_path / "a", "base")
    longer = with_prefix(
        tiny_llama(), AdapterConfig(method="prefix", virtual_tokens=6), "CAUSAL_LM"
    )
    with pytest.raises(CheckpointError, match="this model's adapters; differing: prompt_embedd"):
        load_adapter(longer, tmp_path / "a")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"prefix needs peft, .*pip install"):
        with_prefix(tiny_llama(), CONFIG, "CAUSAL_LM")
