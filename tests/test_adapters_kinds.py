"""Adapters in embeddings and convolutions, against the merged weight and the real peft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapted import adapt, only, perturb, tiny_llama
from torch import Tensor, nn
from torch.nn import functional

import wda
from wda.adapters import AdapterConfig, inject, merge, save_adapter, unmerge
from wda.errors import SelectionError
from wda.updates import merged

METHODS = ["lora", "rslora", "dora", "magnitude", "vera", "dvora"]

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: nn.Embedding(9, 5, padding_idx=0),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2)),
    "conv2d 1x1": lambda: nn.Conv2d(4, 6, 1, bias=False),
    "conv2d same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "conv2d reflected": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[kind]().double()


def inputs(kind: str) -> Tensor:
    torch.manual_seed(2)
    if kind == "embedding":
        return torch.tensor([[3, 0, 8], [1, 3, 3]])
    return torch.randn(2, 4, *([9] if kind == "conv1d" else [9, 8]), dtype=torch.float64)


def sizes(method: str) -> dict[str, Any]:
    of_method = {"magnitude": {}, "vera": {"rank": 40}, "dvora": {"rank": 40}}
    return of_method.get(method, {"rank": 2, "alpha": 7})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LAYERS)
def test_starts_as_the_layer_to_the_last_bit(kind: str, method: str) -> None:
    layer, x = made(kind), inputs(kind)
    before = layer(x)
    assert torch.equal(adapt(layer, method, **sizes(method))(x), before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_and_gradients_are_the_merged_weights(kind: str, method: str) -> None:
    """Eq. 5 on the matrix (out_features, all the rest), put back into the layer's own shape."""
    layer = adapt(made(kind), method, **sizes(method))
    perturb(layer)
    adapter, x = only(layer), inputs(kind)
    v = layer.weight + adapter.update.scaling * adapter.update.B @ adapter.update.A
    wt = v
    if adapter.magnitude is not None:
        wt = adapter.magnitude[:, None] * v / v.norm(dim=1, keepdim=True).detach()
    stored = layer.base_layer.weight
    weight = wt.T if kind == "embedding" else wt.reshape(stored.shape)
    expected = torch.func.functional_call(layer.base_layer, {"weight": weight}, x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    results = []
    for out in (layer(x), expected):
        factors = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        if kind == "embedding":  # its padding has a vector, and learns nothing
            factors = factors * (x != 0)[..., None]
        loss = (factors * out.square()).sum()
        results.append([out, *torch.autograd.grad(loss, trained)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    assert all(gradient.abs().max() > 1e-6 for gradient in results[0])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_merged_it_is_the_same_function_and_unmerged_the_same_bits(
    kind: str, channels_last: bool
) -> None:
    base = made(kind)
    if channels_last and kind.startswith("conv2d"):
        base = base.to(memory_format=torch.channels_last)
    layer = adapt(base, "dora", rank=2, alpha=7)
    perturb(layer)
    x, w0 = inputs(kind), base.weight.clone()
    apart = layer(x)
    merge(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), apart, rtol=1e-11, atol=1e-12)
    assert not torch.equal(base.weight, w0)
    unmerge(layer)
    assert torch.equal(base.weight, w0)


@pytest.mark.parametrize("method", ["lora", "dvora"])
def test_dropout_takes_no_tokens_away(method: str) -> None:
    layer = adapt(made("embedding"), method, rank=2, dropout=0.5)
    perturb(layer)
    assert torch.equal(layer.train()(inputs("embedding")), layer.eval()(inputs("embedding")))


def test_the_paddings_vector_is_not_trained() -> None:
    layer = adapt(made("embedding"), "lora", rank=2)
    layer(inputs("embedding")).sum().backward()
    used = only(layer).A.grad.abs().sum(dim=0) > 0
    assert used.nonzero().flatten().tolist() == [1, 3, 8]


class Net(nn.Module):
    """An embedding, convolutions and a linear layer, called as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(9, 5)
        self.conv_in = nn.Conv1d(5, 7, 3, padding=1)
        self.conv_out = nn.Conv2d(1, 4, (3, 2), stride=2)
        self.q_proj = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv_in(self.embed_tokens(ids).transpose(1, 2))
        h = functional.gelu(self.conv_out(h[:, None]))
        return self.q_proj(h.flatten(2).mean(dim=2))


TARGETS = ["embed_tokens", "conv_in", "conv_out", "q_proj"]


class ResNet(nn.Module):
    """A stem and a block whose shortcut is a convolution of size one, with norms between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pixels = nn.Embedding(9, 3)
        self.stem = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.conv1 = nn.Conv2d(5, 7, (3, 1), padding=(1, 0), bias=False)
        self.conv2 = nn.Conv2d(7, 7, 3, padding=1)
        self.shortcut = nn.Conv2d(5, 7, 1)
        self.head = nn.Linear(7, 4)

    def forward(self, ids: Tensor) -> Tensor:
        image = self.pixels(ids)[..., None, :] * torch.linspace(-1, 1, 6)[:, None]
        h = functional.relu(self.norm(self.stem(image.permute(0, 3, 1, 2).to(self.head.weight))))
        h = functional.relu(self.shortcut(h) + self.conv2(functional.relu(self.conv1(h))))
        return self.head(h.mean(dim=(2, 3)))


def llama() -> Any:
    return tiny_llama(num_hidden_layers=1, vocab_size=9)


def gpt2() -> Any:
    """With a position's vector beside a token's, and a head that has a weight of its own."""
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        n_embd=12, n_layer=1, n_head=2, vocab_size=9, n_positions=16, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "net": (Net, TARGETS),
    "resnet": (ResNet, ["stem", "conv1", "conv2", "shortcut", "head"]),
    "llama": (llama, ["embed_tokens", "v_proj", "lm_head"]),
    "gpt2": (gpt2, ["wte", "wpe", "c_attn"]),
}
THEIR_NAMES = {
    "A": ("lora_A.default.weight", "lora_embedding_A.default"),
    "B": ("lora_B.default.weight", "lora_embedding_B.default"),
    "magnitude": ("lora_magnitude_vector.default.weight",),
}


def outputs(model: Any, ids: Tensor) -> Tensor:
    found = model(ids)
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("case", MODELS)
def test_peft_loads_them_with_the_same_outputs_and_gradients(
    case: str, method: str, tmp_path: Path
) -> None:
    make, targets = MODELS[case]
    model = make().double().eval()
    words = [f"re:(^|\\.){name}$" for name in targets]
    config = AdapterConfig(method=method, rank=3, alpha=7, targets=words)
    assert inject(model, config) == len(targets)
    perturb(model)
    save_adapter(model, config, tmp_path / "a", "base")
    base = make().double().eval()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a", is_trainable=True).eval()
    ids = torch.randint(0, 9, (2, 11))
    ours_out, their_out = outputs(model, ids), outputs(theirs, ids)
    torch.testing.assert_close(ours_out, their_out, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(ours_out, outputs(make().double().eval(), ids), rtol=1e-2)
    ours_out.square().sum().backward()
    their_out.square().sum().backward()
    their_parameters = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        module, _, part = name.partition(".adapters.default.")
        if not parameter.requires_grad:
            continue
        names = [f"base_model.model.{module}.{their}" for their in THEIR_NAMES[part]]
        (other,) = (their_parameters[their] for their in names if their in their_parameters)
        assert parameter.grad.abs().max() > 1e-6
        torch.testing.assert_close(
            parameter.grad.flatten(), other.grad.flatten(), rtol=1e-10, atol=1e-11
        )
        compared += 1
    assert compared == len(targets) * (3 if method == "dora" else 2)


@pytest.mark.parametrize("method", METHODS)
def test_they_enter_the_analysis_by_the_same_door(method: str, tmp_path: Path) -> None:
    model = Net().double()
    torch.save(model.state_dict(), tmp_path / "base.pt")
    targets = [f"re:{name}" for name in TARGETS]
    config = AdapterConfig(method=method, targets=targets, **sizes(method))
    inject(model, config)
    perturb(model)
    save_adapter(model, config, tmp_path / "a", str(tmp_path / "base.pt"))
    wanted = targets if method in ("lora", "rslora", "dora") else ["re:conv_in", "re:q_proj"]
    table = wda.compare(tmp_path / "a", matrices=wanted, progress=False).table
    assert len(table) == len(wanted)
    for _, row in table.iterrows():
        layer = model.get_submodule(row["module"])
        w0 = layer.weight.detach()
        wt = merged(layer.update, w0).detach()
        if row["module"] == "embed_tokens":  # the table's vectors are the tokens'
            w0, wt = w0.T, wt.T
        d = wda.decompose(w0, wt)
        got = (row["delta_m"], row["delta_d"])
        assert got == pytest.approx((d.delta_m, d.delta_d), rel=1e-9, abs=1e-14)


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 2 * super().forward(ids)


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "groups": (nn.Conv1d(4, 8, 3, groups=2), r"q_proj convolve in groups, each with a small"),
    "shortened": (nn.Embedding(5, 4, max_norm=1.0), r"q_proj shorten their vectors in every"),
    "of its own": (
        ScaledEmbedding(5, 4),
        r"adapters go into nn.Linear, .*; q_proj are ScaledEmbedding; choose other targets$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_matrix_is_refused_in_a_line(case: str) -> None:
    layer, message = REFUSED[case]
    with pytest.raises(SelectionError, match=message) as caught:
        adapt(layer, "lora", rank=2)
    assert "\n" not in str(caught.value)


def test_an_embedding_that_the_head_shares_is_refused() -> None:
    shape = transformers.GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=9, n_positions=16)
    model = transformers.GPT2LMHeadModel(shape)
    config = AdapterConfig(method="dora", rank=2, targets=["wte"])
    with pytest.raises(SelectionError, match=r"transformer.wte shares its weight with lm_head"):
        inject(model, config)
    assert isinstance(model.transformer.wte, nn.Embedding)
