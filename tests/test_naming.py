"""Labels, layers and splits, on the parameter names of transformers' own models."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers

from wda.errors import PairingError, SelectionError
from wda.naming import Matrix, align, find_matrices, layer_index, matrix_label, select

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}

# Architecture → its configuration, and how many matrices of each label it must have.
ARCHITECTURES = {
    "bert": (
        transformers.BertConfig(**SMALL, intermediate_size=40),
        {"query": 2, "key": 2, "value": 2, "output": 2, "up": 2, "down": 2},
    ),
    "roberta": (
        transformers.RobertaConfig(**SMALL, intermediate_size=40),
        {"query": 2, "key": 2, "value": 2, "output": 2, "up": 2, "down": 2},
    ),
    "distilbert": (
        transformers.DistilBertConfig(dim=24, n_layers=2, n_heads=4, hidden_dim=40, vocab_size=50),
        {"query": 2, "key": 2, "value": 2, "output": 2, "up": 2, "down": 2},
    ),
    "llama": (
        transformers.LlamaConfig(**SMALL, intermediate_size=40, num_key_value_heads=2),
        {"query": 2, "key": 2, "value": 2, "output": 2, "gate": 2, "up": 2, "down": 2},
    ),
    "qwen2": (
        transformers.Qwen2Config(**SMALL, intermediate_size=40, num_key_value_heads=2),
        {"query": 2, "key": 2, "value": 2, "output": 2, "gate": 2, "up": 2, "down": 2},
    ),
    "t5": (
        transformers.T5Config(
            d_model=24, d_kv=6, num_heads=4, d_ff=40, num_layers=2, vocab_size=50
        ),
        # Two stacks; the decoder attends twice.
        {"query": 6, "key": 6, "value": 6, "output": 6, "up": 4, "down": 4},
    ),
    "t5-gated": (
        transformers.T5Config(
            d_model=24,
            d_kv=6,
            num_heads=4,
            d_ff=40,
            num_layers=2,
            vocab_size=50,
            feed_forward_proj="gated-gelu",
        ),
        {"query": 6, "key": 6, "value": 6, "output": 6, "gate": 4, "up": 4, "down": 4},
    ),
    "bart": (
        transformers.BartConfig(
            d_model=24,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            vocab_size=50,
        ),
        {"query": 6, "key": 6, "value": 6, "output": 6, "up": 4, "down": 4},
    ),
    "gpt2": (
        transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=50),
        {"query": 2, "key": 2, "value": 2, "output": 2, "up": 2, "down": 2},
    ),
    "opt": (
        transformers.OPTConfig(**SMALL, ffn_dim=40, word_embed_proj_dim=24),
        {"query": 2, "key": 2, "value": 2, "output": 2, "up": 2, "down": 2},
    ),
}


def shapes_of(config: transformers.PretrainedConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architectures_own_names_become_labels(name: str) -> None:
    config, expected = ARCHITECTURES[name]
    matrices = find_matrices(shapes_of(config))
    counts = Counter(m.label for m in matrices if m.layer is not None)
    assert {label: counts[label] for label in expected} == expected
    assert {m.layer for m in matrices if m.label in expected} == {0, 1}
    # Nothing else in the layers passes for one of them.
    known = set(expected) | {"relative_attention_bias"}
    assert set(counts) <= known


def test_gpt2_is_turned_and_split() -> None:
    config, _ = ARCHITECTURES["gpt2"]
    matrices = find_matrices(shapes_of(config))
    first = [m for m in matrices if m.module == "h.0.attn.c_attn"]
    assert [(m.label, m.shape, m.part) for m in first] == [
        ("query", (24, 24), (range(24),)),
        ("key", (24, 24), (range(24, 48),)),
        ("value", (24, 24), (range(48, 72),)),
    ]
    stored = torch.arange(24 * 72).reshape(24, 72)
    assert torch.equal(first[2].take(stored), stored[:, 48:].T)
    # A square Conv1D cannot be told by its shape, but by the company it keeps.
    (square,) = [m for m in matrices if m.module == "h.0.attn.c_proj"]
    assert square.stored_transposed
    assert torch.equal(square.take(stored[:, :24]), stored[:, :24].T)


def test_linear_layers_of_the_same_names_are_not_turned() -> None:
    """GPT-Neo's c_fc and GPTBigCode's c_attn are ordinary linear layers."""
    shapes = {"h.0.mlp.c_fc.weight": (96, 24), "h.0.attn.c_attn.weight": (36, 24)}
    assert not any(m.stored_transposed for m in find_matrices(shapes))


def test_layers_are_in_order_and_numbers_are_numbers() -> None:
    shapes = {f"layers.{i}.q_proj.weight": (3, 4) for i in (10, 9, 1)}
    assert [m.layer for m in find_matrices(shapes)] == [1, 9, 10]
    assert layer_index("encoder.layers.11.blocks.2.q") == 11


def labelled(*modules: str) -> list[Matrix]:
    return find_matrices({f"{module}.weight": (3, 4) for module in modules})


def test_selection_by_label_last_name_and_pattern() -> None:
    matrices = labelled("layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "head")
    assert [m.module for m in select(matrices, ["query"])] == ["layers.0.q_proj", "layers.1.q_proj"]
    assert [m.module for m in select(matrices, ["v_proj"])] == ["layers.0.v_proj"]
    assert [m.module for m in select(matrices, [r"re:layers\.1|head"])] == [
        "head",
        "layers.1.q_proj",
    ]
    assert matrix_label("head") == "head"


def test_an_unknown_label_lists_those_that_exist() -> None:
    matrices = labelled("layers.0.q_proj", "layers.1.q_proj", "head")
    with pytest.raises(
        SelectionError, match=r"'queri'; labels that exist here: head \(1\), query \(2\)"
    ):
        select(matrices, ["query", "queri"])
    with pytest.raises(SelectionError, match=r"'re:\(' is not a regular expression"):
        select(matrices, ["re:("])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (["bert.layer.0.q", "classifier"], ["layer.0.q", "pooler"]),
        (["layer.0.q"], ["bert.layer.0.q", "classifier"]),
        (["model.layers.0.q", "score"], ["model.layers.0.q", "lm_head"]),
        (["model.model.layers.0.q"], ["language_model.layers.0.q"]),
    ],
)
def test_prefixes_of_task_models_are_seen_through(ours: list[str], theirs: list[str]) -> None:
    rename = align(ours, theirs)
    assert rename(ours[0]) == theirs[0]


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(PairingError, match="no module of the checkpoint has a name"):
        align(["layer.0.q"], ["blocks.0.attn"])
