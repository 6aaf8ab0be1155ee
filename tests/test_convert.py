"""wda convert: adapters in another layout, held to arithmetic of their own and to peft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import wda_command
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wda
from wda.checkpoints import Given
from wda.errors import CheckpointError, ConversionError, OutputError, WdaError

# One name is the end of another, and none is square.
SHAPES = {
    "encoder.layers.0.q_proj": (10, 12),
    "encoder.layers.0.v_proj": (8, 12),
    "encoder.layers.1.q_proj": (10, 12),
    "vision.encoder.layers.0.q_proj": (6, 10),
}
ALL = tuple(SHAPES)
DOUBLE = torch.float64


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        f"{module}.weight": torch.randn(shape, generator=generator).to(dtype)
        for module, shape in SHAPES.items()
    }


class Model(nn.Module):
    """The base as a module, in float64."""

    def __init__(self) -> None:
        super().__init__()
        for module, (out, features) in SHAPES.items():
            *path, last = module.split(".")
            parent: nn.Module = self
            for word in path:
                if not hasattr(parent, word):
                    parent.add_module(word, nn.Module())
                parent = getattr(parent, word)
            parent.add_module(last, nn.Linear(features, out, bias=False))
        self.double().load_state_dict({name: w.double() for name, w in weights().items()})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(weights(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "pico"}))
    return folder


def adapter(
    folder: Path,
    ranks: dict[str, int],
    alphas: dict[str, float],
    decomposed: bool = False,
    dtype: torch.dtype = DOUBLE,
    **config: object,
) -> dict[str, Tensor]:
    """Write an adapter as peft does, by hand, and give the weights it makes, in float64."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    tensors, merged = {}, {}
    for module, rank in ranks.items():
        out, features = SHAPES[module]
        w0 = weights()[f"{module}.weight"].double()
        a = torch.randn(rank, features, generator=generator, dtype=DOUBLE).to(dtype)
        b = 0.1 * torch.randn(out, rank, generator=generator, dtype=DOUBLE).to(dtype)
        v = w0 + alphas[module] / rank * b.double() @ a.double()
        path = f"base_model.model.{module}"
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        if decomposed:
            noise = torch.randn(out, generator=generator, dtype=DOUBLE)
            m = (w0.norm(dim=1) * (1 + 0.1 * noise)).to(dtype)
            tensors[f"{path}.lora_magnitude_vector"] = m
            v = m.double()[:, None] * v / v.norm(dim=1, keepdim=True)
        merged[module] = v
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {
        "peft_type": "LORA",
        "peft_version": "0.15.0",
        "r": 1,
        "lora_alpha": 1,
        "rank_pattern": {f"^{module}": rank for module, rank in ranks.items()},
        "alpha_pattern": {f"^{module}": alphas[module] for module in ranks},
        "target_modules": list(ranks),
        "use_dora": decomposed,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return merged


RANKS = dict(zip(ALL, (3, 5, 3, 1), strict=True))
ONE_SCALING = {module: 2.5 * rank for module, rank in RANKS.items()}
ALPHAS = dict(zip(ALL, (7, 7, 2.5, 4), strict=True))


def table(place: Path, base: Path) -> pd.DataFrame:
    found = wda.compare(place, base=base, matrices="re:.*", cache=False, progress=False).table
    return found.set_index("module").sort_index()


def check_same(first: Path, second: Path, base: Path) -> None:
    a, b = table(first, base), table(second, base)
    assert list(a.index) == list(b.index)
    for column in ("delta_m", "delta_d"):
        assert b[column].tolist() == pytest.approx(a[column].tolist(), rel=1e-12, abs=1e-15)
        assert (a[column] > 1e-4).any()


def peft_merges(folder: Path) -> dict[str, Tensor]:
    # In float64, as nothing tells peft to widen it.
    model = PeftModel.from_pretrained(Model(), folder, autocast_adapter_dtype=False)
    model.double()
    state = load_file(folder / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        key = name.replace(".default", "").removesuffix(".weight")
        for stored in (key, f"{key}.weight"):
            if stored in state:
                parameter.data = state.pop(stored).double()
    assert not state, "peft has no place for these"
    merged = model.merge_and_unload().state_dict()
    return {name.removesuffix(".weight"): w for name, w in merged.items()}


def check_merged(folder: Path, truth: dict[str, Tensor]) -> None:
    merged = peft_merges(folder)
    for module in ALL:
        w0 = weights()[f"{module}.weight"].double()
        expected = truth.get(module, w0)
        assert torch.linalg.norm(merged[module] - expected) <= 1e-14 * torch.linalg.norm(expected)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("through", ["peft", "lycoris", "mlx", "nvlabs"])
def test_there_and_back(through: str, decomposed: bool, tmp_path: Path, base: Path) -> None:
    alphas = ALPHAS if through in ("peft", "lycoris") else ONE_SCALING
    dtype = torch.float32 if through == "mlx" else DOUBLE
    truth = adapter(tmp_path / "a", RANKS, alphas, decomposed, dtype)
    # A folder of LyCORIS's says nothing of itself; its file does.
    written = "b/lycoris.safetensors" if through == "lycoris" else "b"
    for source, to, folder in (("a", through, "b"), (written, "peft", "c")):
        done = wda.convert(tmp_path / source, to, tmp_path / folder, base=base, progress=False)
        assert done.errors == {}
        assert all(file.is_file() for file in done.files)
        check_same(tmp_path / source, tmp_path / (written if folder == "b" else folder), base)
    check_merged(tmp_path / "c", truth)
    a, c = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ac")
    assert {t.dtype for name, t in c.items() if name in a and "lora_B" in name} == {dtype}


def test_names_that_end_as_others(tmp_path: Path, base: Path) -> None:
    """An adapter of the shorter name alone must not take the longer one along."""
    short = "encoder.layers.0.q_proj"
    truth = adapter(tmp_path / "a", {short: 3}, {short: 7})
    wda.convert(tmp_path / "a", "peft", tmp_path / "b", base=base, progress=False)
    model = PeftModel.from_pretrained(Model(), tmp_path / "b")
    changed = {name for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert changed == {f"base_model.model.{short}.lora_A"}
    check_merged(tmp_path / "b", truth)


def unlike(folder: Path, base: Path) -> dict[str, Tensor]:
    """Write an adapter of the paper's code: factors and magnitude, and a magnitude alone."""
    truth = adapter(folder, {ALL[0]: 3, ALL[1]: 3}, {ALL[0]: 7, ALL[1]: 7}, True)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    held = {
        name.replace("lora_magnitude_vector", "weight_m_wdecomp.weight"): tensor
        for name, tensor in tensors.items()
        if f"{ALL[1]}.lora_" not in name or "magnitude" in name
    }
    torch.save(held, folder / "adapter_model.bin")
    config = {"peft_type": "DORA", "r": 3, "lora_alpha": 7, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    w0 = weights()[f"{ALL[1]}.weight"].double()
    m = held[f"base_model.model.{ALL[1]}.weight_m_wdecomp.weight"]
    return {**truth, ALL[1]: m[:, None] * w0 / w0.norm(dim=1, keepdim=True)}


@pytest.mark.parametrize("to", ["peft", "nvlabs", "mlx"])
def test_a_magnitude_alone(to: str, tmp_path: Path, base: Path) -> None:
    truth = unlike(tmp_path / "a", base)
    wda.convert(tmp_path / "a", to, tmp_path / "b", progress=False)
    check_same(tmp_path / "a", tmp_path / "b", base)
    if to == "peft":
        check_merged(tmp_path / "b", truth)
        tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
        zeros = tensors[f"base_model.model.{ALL[1]}.lora_A.weight"]
        assert zeros.shape == (1, 12)
        assert not zeros.any()
    if to == "nvlabs":
        tensors = torch.load(tmp_path / "b" / "adapter_model.bin")
        assert not [name for name in tensors if f"{ALL[1]}.lora_" in name]
        assert tensors[f"base_model.model.{ALL[1]}.weight_m_wdecomp.weight"].shape == (8, 1)
        config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
        assert config["Wdecompose_target_modules"] == [ALL[1]]
        assert config["target_modules"] == [ALL[0]]
        assert config["lora_alpha"] == 7


def test_missing_magnitudes_leave_the_weight_alone(tmp_path: Path, base: Path) -> None:
    truth = adapter(tmp_path / "a", RANKS, ONE_SCALING)
    with pytest.raises(ConversionError, match="magnitude that the layout asks for needs the base"):
        wda.convert(tmp_path / "a", "nvlabs", tmp_path / "b", progress=False)
    assert not (tmp_path / "b").exists()
    wda.convert(tmp_path / "a", "nvlabs", tmp_path / "b", base=base, progress=False)
    check_same(tmp_path / "a", tmp_path / "b", base)
    wda.convert(tmp_path / "b", "peft", tmp_path / "c", progress=False)
    check_merged(tmp_path / "c", truth)


@pytest.mark.parametrize("decomposed", [False, True])
def test_lycoris(decomposed: bool, tmp_path: Path) -> None:
    truth = adapter(tmp_path / "a", RANKS, ALPHAS, decomposed)
    wda.convert(tmp_path / "a", "lycoris", tmp_path / "b", progress=False)
    tensors = load_file(tmp_path / "b" / "lycoris.safetensors")
    for module, expected in truth.items():
        path = f"lycoris_{module.replace('.', '_')}"
        down, up = (tensors.pop(f"{path}.lora_{kind}.weight") for kind in ("down", "up"))
        v = weights()[f"{module}.weight"].double()
        v = v + tensors.pop(f"{path}.alpha") / len(down) * up @ down
        if decomposed:
            scale = tensors.pop(f"{path}.dora_scale")
            assert scale.shape == (len(v), 1)
            v = scale * v / v.norm(dim=1, keepdim=True)
        torch.testing.assert_close(v, expected, rtol=1e-13, atol=1e-13)
    assert not tensors


LLAMA = {
    "model.layers.0.self_attn.q_proj": (16, 12),
    "model.layers.0.self_attn.k_proj": (8, 12),
    "model.layers.0.self_attn.o_proj": (12, 16),
    "model.layers.1.mlp.gate_proj": (20, 12),
    "lm_head": (30, 12),
}


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base of 4 query heads and 2 key heads of 4 features."""
    monkeypatch.setattr("test_convert.SHAPES", LLAMA)
    folder = tmp_path / "llama"
    folder.mkdir()
    save_file(weights(), folder / "model.safetensors")
    save_config(folder, "llama")
    return folder


def save_config(base: Path, kind: str, **changes: int | None) -> None:
    config = {
        "model_type": kind,
        "hidden_size": 12,
        "head_dim": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **changes,
    }
    (base / "config.json").write_text(
        json.dumps({key: said for key, said in config.items() if said is not None})
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("decomposed", [False, True])
def test_torchtune(kind: str, decomposed: bool, tmp_path: Path, llama: Path) -> None:
    save_config(llama, kind)
    ranks = dict(zip(LLAMA, (3, 3, 3, 5, 3), strict=True))
    truth = adapter(tmp_path / "a", ranks, {m: 2.0 * r for m, r in ranks.items()}, decomposed)
    wda.convert(tmp_path / "a", "torchtune", tmp_path / "b", base=llama, progress=False)
    tensors = torch.load(tmp_path / "b" / "adapter_model.pt")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 10)
    names = ("attn.q_proj", "attn.k_proj", "attn.output_proj", "mlp.w1")
    paths = [f"layers.{n // 3}.{name}" for n, name in enumerate(names)] + ["output"]
    for path, (module, expected) in zip(paths, truth.items(), strict=True):
        a, b = tensors.pop(f"{path}.lora_a.weight"), tensors.pop(f"{path}.lora_b.weight")
        w0 = weights()[f"{module}.weight"].double()
        # Row 2i + h of a head, of 4 features, was row i + 2h.
        order = [4 * (row // 4) + 2 * (row % 2) + row % 4 // 2 for row in range(len(w0))]
        turned = kind == "llama" and path.endswith(("q_proj", "k_proj"))
        w0, wt = (w[order] if turned else w for w in (w0, expected))
        v = w0 + 2 * b @ a
        if decomposed:
            v = tensors.pop(f"{path}.magnitude")[:, None] * v / v.norm(dim=1, keepdim=True)
        torch.testing.assert_close(v, wt, rtol=1e-13, atol=1e-13)
    assert not tensors


def test_torchtune_is_readable_or_not_written(tmp_path: Path, llama: Path) -> None:
    """The order of rows needs the size of a head, wherever the configuration has it."""
    modules = list(LLAMA)
    adapter(tmp_path / "a", dict.fromkeys(modules, 3), dict.fromkeys(modules, 6))

    def converted() -> None:
        wda.convert(tmp_path / "a", "torchtune", tmp_path / "b", base=llama, progress=False)

    for lacking in ({"hidden_size": None}, {"num_attention_heads": None}):
        save_config(llama, "llama", head_dim=None, **lacking)
        with pytest.raises(ConversionError, match="does not say how many rows a head has"):
            converted()
    save_config(llama, "llama", head_dim=5)
    with pytest.raises(ConversionError, match="its 8 rows are no heads of 5"):
        converted()
    assert not (tmp_path / "b").exists()
    save_config(llama, "llama", hidden_size=None, num_key_value_heads=None)
    converted()
    again = wda.compare(tmp_path / "b", base=llama, matrices="re:.*", cache=False, progress=False)
    first = wda.compare(tmp_path / "a", base=llama, matrices="re:.*", cache=False, progress=False)
    for measure in ("delta_m", "delta_d"):
        assert again.table[measure].tolist() == pytest.approx(first.table[measure].tolist())
    (tmp_path / "b" / "config.json").write_text('{"model_type": "llama", "head_dim": 5}')
    with pytest.raises(CheckpointError, match="8 rows, which are no heads of 5"):
        wda.compare(tmp_path / "b", base=llama, progress=False)


def test_what_torchtune_has_no_place_for(tmp_path: Path, base: Path) -> None:
    adapter(tmp_path / "a", {ALL[0]: 3}, {ALL[0]: 7})
    with pytest.raises(ConversionError, match="known for llama, .*qwen3, not for pico"):
        wda.convert(tmp_path / "a", "torchtune", tmp_path / "b", base=base, progress=False)
    save_config(base, "llama")
    with pytest.raises(ConversionError, match=f"{ALL[0]}: torchtune has no name for it"):
        wda.convert(tmp_path / "a", "torchtune", tmp_path / "b", base=base, progress=False)
    with pytest.raises(ConversionError, match="nothing can stand in for it"):
        wda.convert(
            tmp_path / "a", "torchtune", tmp_path / "b", base, approximate=2, progress=False
        )


@pytest.mark.parametrize("to", ["mlx", "nvlabs", "torchtune"])
def test_unequal_scalings(to: str, tmp_path: Path, llama: Path) -> None:
    ranks = dict.fromkeys(LLAMA, 3)
    alphas = dict.fromkeys(LLAMA, 6.0) | {"lm_head": 7.0}
    truth = adapter(tmp_path / "a", ranks, alphas, True, torch.float32)
    with pytest.raises(
        ConversionError, match=r"lm_head: its scaling 2.33333 is not the 2 of the others; --approx"
    ):
        wda.convert(tmp_path / "a", to, tmp_path / "b", base=llama, progress=False)
    done = wda.convert(tmp_path / "a", to, tmp_path / "b", llama, approximate=1, progress=False)
    assert list(done.errors) == ["lm_head"]
    assert 1e-9 < done.errors["lm_head"] < 1e-6
    if to == "mlx":
        tensors = load_file(tmp_path / "b" / "adapters.safetensors")
        v = weights()["lm_head.weight"].double()
        v = v + 2 * (tensors["lm_head.lora_a"].double() @ tensors["lm_head.lora_b"].double()).T
        v = tensors["lm_head.m"].double()[:, None] * v / v.norm(dim=1, keepdim=True)
        w0 = weights()["lm_head.weight"].double()
        off = (v - truth["lm_head"]).norm() / (truth["lm_head"] - w0).norm()
        assert done.errors["lm_head"] == pytest.approx(float(off), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 4])
def test_what_is_no_factors_is_approximated(rank: int, tmp_path: Path, base: Path) -> None:
    """A module trained whole, which MLX-LM's adapters have no place for."""
    truth = adapter(tmp_path / "a", {ALL[0]: 3}, {ALL[0]: 7})
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    w0 = weights()[f"{ALL[1]}.weight"]
    whole = w0 + 0.1 * torch.randn(w0.shape, generator=torch.Generator().manual_seed(3))
    tensors[f"base_model.model.{ALL[1]}.weight"] = whole
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match=f"{ALL[1]}: it is trained whole, for which"):
        wda.convert(tmp_path / "a", "mlx", tmp_path / "b", base=base, progress=False)
    with pytest.raises(ConversionError, match="approximating it needs the base"):
        wda.convert(tmp_path / "a", "mlx", tmp_path / "b", approximate=rank, progress=False)
    done = wda.convert(tmp_path / "a", "mlx", tmp_path / "b", base, rank, progress=False)
    delta = (whole.double() - w0.double()).numpy()
    singular = torch.linalg.svdvals(torch.tensor(delta @ delta.T)).sqrt()
    least = float((singular[rank:].square().sum() / singular.square().sum()).sqrt())
    assert done.errors == {ALL[1]: pytest.approx(least, rel=1e-6)}
    found = load_file(tmp_path / "b" / "adapters.safetensors")
    written = (found[f"{ALL[1]}.lora_a"].double() @ found[f"{ALL[1]}.lora_b"].double()).T * 7 / 3
    off = (written - torch.tensor(delta)).norm() / torch.tensor(delta).norm()
    assert float(off) == pytest.approx(least, rel=1e-6)
    # The other module is as exact as before.
    found = {k: t.double() for k, t in found.items()}
    change = (found[f"{ALL[0]}.lora_a"] @ found[f"{ALL[0]}.lora_b"]).T * 7 / 3
    start = weights()[f"{ALL[0]}.weight"].double()
    torch.testing.assert_close(start + change, truth[ALL[0]], rtol=1e-13, atol=1e-13)


def test_magnitudes_per_input_are_no_factors(tmp_path: Path, base: Path) -> None:
    from wda.checkpoints import open_checkpoint
    from wda.checkpoints.forms import Decomposed
    from wda.conversion.source import Source

    adapter(tmp_path / "a", {ALL[0]: 3}, {ALL[0]: 7}, True)
    found = open_checkpoint(tmp_path / "a")
    form = found.forms[ALL[0]]
    found.forms[ALL[0]] = Decomposed(form.inner, form.magnitude, "input")
    assert Source(found, base).carried(ALL[0]) == "it has a magnitude per input feature"


@pytest.mark.parametrize("to", ["peft", "nvlabs"])
def test_modules_trained_whole_come_along(to: str, tmp_path: Path, base: Path) -> None:
    alphas = {ALL[0]: 7.0}
    adapter(tmp_path / "a", {ALL[0]: 3}, alphas, decomposed=True, modules_to_save=["classifier"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    head = {"weight": torch.randn(2, 12), "bias": torch.randn(2)}
    named = {f"base_model.model.classifier.{kind}": tensor for kind, tensor in head.items()}
    save_file(load_file(file) | named, file)
    wda.convert(tmp_path / "a", to, tmp_path / "b", base=base, progress=False)
    if to == "peft":
        written = load_file(tmp_path / "b" / "adapter_model.safetensors")
    else:
        written = torch.load(tmp_path / "b" / "adapter_model.bin")
    for name, tensor in named.items():
        assert torch.equal(written[name], tensor)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    with pytest.raises(ConversionError, match="classifier: approximating it needs its base weight"):
        wda.convert(tmp_path / "a", "mlx", tmp_path / "c", base, approximate=2, progress=False)


def test_convolutions(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    path = "base_model.model.conv"
    tensors = {
        f"{path}.lora_A.weight": torch.randn(3, 4, 3, 3),
        f"{path}.lora_B.weight": torch.randn(6, 3, 1, 1),
        f"{path}.lora_magnitude_vector": torch.rand(1, 6, 1, 1),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    wda.convert(folder, "peft", tmp_path / "b", progress=False)
    written = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    wda.convert(folder, "lycoris", tmp_path / "c", progress=False)
    shapes = {
        k: tuple(t.shape) for k, t in load_file(tmp_path / "c" / "lycoris.safetensors").items()
    }
    assert shapes == {
        "lycoris_conv.lora_down.weight": (3, 4, 3, 3),
        "lycoris_conv.lora_up.weight": (6, 3, 1, 1),
        "lycoris_conv.alpha": (),
        "lycoris_conv.dora_scale": (6, 1, 1, 1),
    }
    with pytest.raises(ConversionError, match="conv: it is a convolution, which the layout has"):
        wda.convert(folder, "mlx", tmp_path / "d", progress=False)


def test_gpt2_is_stored_the_other_way_round(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(n_layer=2, n_embd=12, n_head=2, vocab_size=20, n_positions=8))
    model.save_pretrained(tmp_path / "base")
    folder = tmp_path / "a"
    folder.mkdir()
    a, b = torch.randn(12, 3), torch.randn(3, 36)
    m = 1 + torch.rand(36)
    tensors = {"h.0.attn.c_attn.lora_a": a, "h.0.attn.c_attn.lora_b": b, "h.0.attn.c_attn.m": m}
    save_file(tensors, folder / "adapters.safetensors")
    config = {"fine_tune_type": "dora", "lora_parameters": {"rank": 3, "scale": 2.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    wda.convert(folder, "peft", tmp_path / "b", base=tmp_path / "base", progress=False)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["fan_in_fan_out"]
    peft = PeftModel.from_pretrained(model.double(), tmp_path / "b").double()
    name = "h.0.attn.c_attn.weight"
    w0 = load_file(tmp_path / "base" / "model.safetensors")[name].double()
    v = w0.T + 2 * (a.double() @ b.double()).T
    expected = m.double()[:, None] * v / v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(peft.merge_and_unload().state_dict()[name].T, expected)


def test_refusals(tmp_path: Path, base: Path) -> None:
    adapter(tmp_path / "run" / "checkpoint-1", {ALL[0]: 3}, {ALL[0]: 7})
    one, out = tmp_path / "run" / "checkpoint-1", tmp_path / "b"
    with pytest.raises(OutputError, match="is the adapter's own folder; choose another"):
        wda.convert(one, "mlx", one, progress=False)
    with pytest.raises(ConversionError, match="'gguf' is no layout that is written; peft, lycoris"):
        wda.convert(one, "gguf", out, progress=False)
    with pytest.raises(ConversionError, match="is a whole model; only adapters are converted"):
        wda.convert(base, "mlx", out, progress=False)
    with pytest.raises(OutputError, match=r"holds other weights \(model.safetensors\)"):
        wda.convert(one, "mlx", base, progress=False)
    adapter(tmp_path / "run" / "checkpoint-2", {ALL[0]: 3}, {ALL[0]: 7})
    with pytest.raises(ConversionError, match=r"holds 2 checkpoints; give one .*checkpoint-2"):
        wda.convert(tmp_path / "run", "mlx", out, progress=False)
    with pytest.raises(WdaError, match="no such file"):
        wda.convert(tmp_path / "nowhere", "mlx", out, progress=False)
    assert not out.exists()


def test_another_shape_than_the_base_has(tmp_path: Path, base: Path) -> None:
    adapter(tmp_path / "a", {ALL[0]: 3}, {ALL[0]: 7})
    save_file({f"{ALL[0]}.weight": torch.ones(4, 4)}, base / "model.safetensors")
    with pytest.raises(ConversionError, match=r"is 10×12, in .*base 4×4 \(out×in\)"):
        wda.convert(tmp_path / "a", "nvlabs", tmp_path / "b", base=base, progress=False)


def test_embeddings_have_other_keys(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "embed_tokens", (6, 10))
    adapter(tmp_path / "a", {"embed_tokens": 3}, {"embed_tokens": 7})
    with pytest.raises(ConversionError, match="embed_tokens: it is an embedding"):
        wda.convert(tmp_path / "a", "lycoris", tmp_path / "b", progress=False)


def test_what_was_not_read_is_named(tmp_path: Path) -> None:
    adapter(tmp_path / "a", {ALL[0]: 3}, {ALL[0]: 7})
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.x.stray": torch.ones(2)}, file)
    done = wda.convert(tmp_path / "a", "mlx", tmp_path / "b", progress=False)
    assert done.notes == ("not converted, for it was not read: base_model.model.x.stray",)


def test_command_line(tmp_path: Path, base: Path) -> None:
    adapter(tmp_path / "a", RANKS, ALPHAS, True, base_model_name_or_path=str(base))
    done = wda_command("convert", "a", "--to", "peft", "--out", "b", cwd=tmp_path)
    written = "written to b: adapter_model.safetensors, adapter_config.json\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", written)
    done = wda_command("convert", "a", "--to", "mlx", "--out", "c", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("wda: cannot be expressed exactly: encoder.layers.0.v_proj: its")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "c").exists()
    done = wda_command(
        "convert", "a", "--to", "mlx", "--out", "c", "--approximate", "3", cwd=tmp_path
    )
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["approximated", "relative", "error"]
    assert {line[0] for line in lines[1:]} == {m for m in ALL if m != ALL[0]}


FIXTURES = Path(__file__).parent / "fixtures"
# Rows of queries and keys in another order; projections that the base has apart; both fused.
IN_PARTS = (
    "torchtune-llama-dora",
    "torchtune-qwen2-dora",
    "torchtune-gemma-lora",
    "litgpt-lora-hf",
    "litgpt-lora",
    "litgpt-interleaved-qkv",
    "nemo-dora",
    "nemo-lora",
    "peft-0.2-enable-lora",
)


def fixture(name: str) -> tuple[Path, Path, Given]:
    """Give a checkpoint that another library wrote, its base, and what it does not say itself."""
    folder = FIXTURES / name
    place = next(path for path in folder.iterdir() if path.stem == "checkpoint")
    options = json.loads((folder / "about.json").read_text())["options"]
    return place, folder / "base", Given(**options)


def measured(place: Path, base: Path, given: Given) -> pd.DataFrame:
    found = wda.compare(
        place, base=base, matrices="re:.*", cache=False, progress=False, given=given
    ).table
    return found.set_index(["module", "matrix"]).sort_index()


@pytest.mark.parametrize("to", ["peft", "mlx"])
@pytest.mark.parametrize("name", IN_PARTS)
def test_parts_of_projections(name: str, to: str, tmp_path: Path) -> None:
    place, base, given = fixture(name)
    done = wda.convert(place, to, tmp_path / "b", base=base, given=given, progress=False)
    assert (done.errors, done.notes) == ({}, ())
    a, b = measured(place, base, given), measured(tmp_path / "b", base, Given())
    assert list(a.index) == list(b.index)
    for column in ("delta_m", "delta_d"):
        assert b[column].tolist() == pytest.approx(a[column].tolist(), rel=1e-12, abs=1e-15)
        assert (a[column] > 1e-6).any()


@pytest.mark.parametrize(
    "name", [n for n in IN_PARTS if n.startswith(("torch", "nemo", "litgpt-lora-hf"))]
)
def test_parts_by_arithmetic_of_our_own(name: str, tmp_path: Path) -> None:
    """What is written for PEFT makes the weights that the other library makes."""
    place, base, given = fixture(name)
    wda.convert(place, "peft", tmp_path / "b", base=base, given=given, progress=False)
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert not config["rank_pattern"]
    w0s = load_file(base / "model.safetensors")
    for weight, wt in load_file(FIXTURES / name / "truth.safetensors").items():
        path = f"base_model.model.{weight.removesuffix('.weight')}"
        v = w0s[weight].double()
        if f"{path}.lora_A.weight" in tensors:
            a, b = (tensors.pop(f"{path}.lora_{kind}.weight").double() for kind in "AB")
            v = v + config["lora_alpha"] / config["r"] * b @ a
        if config["use_dora"] and f"{path}.lora_magnitude_vector" in tensors:
            m = tensors.pop(f"{path}.lora_magnitude_vector").double()
            v = m[:, None] * v / v.norm(dim=1, keepdim=True)
        assert torch.linalg.norm(v - wt) <= 1e-6 * torch.linalg.norm(wt), weight
    assert not tensors


@pytest.mark.parametrize("name", [n for n in IN_PARTS if n.startswith("torchtune")])
def test_torchtune_there_and_back(name: str, tmp_path: Path) -> None:
    place, base, _ = fixture(name)
    own = place / "adapter_model.pt" if (place / "adapter_model.pt").exists() else place
    # Its order of rows is the config.json's beside it; no base is asked for.
    wda.convert(place, "peft", tmp_path / "b", progress=False)
    wda.convert(tmp_path / "b", "torchtune", tmp_path / "c", base=base, progress=False)
    before = torch.load(own, weights_only=True)
    after = torch.load(tmp_path / "c" / "adapter_model.pt", weights_only=True)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key]), key


def test_parts_have_the_ranks_of_their_own_factors(tmp_path: Path) -> None:
    """LitGPT's queries and values have factors of their own; fused, they lie block by block."""
    place, apart, _ = fixture("litgpt-lora-hf")
    wda.convert(place, "peft", tmp_path / "b", base=apart, progress=False)
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert {len(t) for name, t in tensors.items() if "lora_A" in name} == {3}
    assert not any("qkv" in name for name in tensors)
    place, fused, _ = fixture("litgpt-lora")
    wda.convert(place, "peft", tmp_path / "c", base=fused, progress=False)
    tensors = load_file(tmp_path / "c" / "adapter_model.safetensors")
    ranks = {len(t) for name, t in tensors.items() if "qkv.lora_A" in name}
    assert ranks == {6}
    assert not any("q_proj" in name for name in tensors)


def test_parts_that_the_base_has_fused(tmp_path: Path) -> None:
    """The parts are called as a Llama's are, and this base has three of them in one."""
    place, base, _ = fixture("litgpt-lora-hf")
    tensors = load_file(base / "model.safetensors")
    fused = tmp_path / "fused"
    fused.mkdir()
    paths = sorted({n.partition("q_proj")[0] for n in tensors if "q_proj" in n})
    for path in paths:
        thirds = [tensors.pop(f"{path}{part}_proj.weight") for part in "qkv"]
        tensors[f"{path}qkv_proj.weight"] = torch.cat(thirds)
    save_file(tensors, fused / "model.safetensors")
    (fused / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(ConversionError, match=r"fused has no .*\.q_proj; give a base .* modules"):
        wda.convert(place, "peft", tmp_path / "b", base=fused, progress=False)
    assert not (tmp_path / "b").exists()


def test_torchtunes_own_export(tmp_path: Path) -> None:
    """Its export in PEFT's layout, whose rows are mixed up, becomes what its own layout becomes."""
    place, base, _ = fixture("torchtune-llama-dora")
    exported = tmp_path / "exported"
    exported.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "config.json"):
        shutil.copy(place / name, exported)
    for folder, out in ((place, "b"), (exported, "c")):
        wda.convert(folder, "peft", tmp_path / out, base=base, progress=False)
    own, repaired = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "bc")
    assert own.keys() == repaired.keys()
    assert all(torch.equal(tensor, repaired[name]) for name, tensor in own.items())
    stored = load_file(exported / "adapter_model.safetensors")
    mixed = [n for n in own if n in stored and not torch.equal(own[n], stored[n])]
    assert mixed
    assert all("magnitude" in name for name in mixed)


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_loralibs_merged_linear(to: str, tmp_path: Path) -> None:
    place, base, given = fixture("loralib-gpt2")
    content = torch.load(place, weights_only=True)
    content["model_state_dict"] = {
        name: t for name, t in content["model_state_dict"].items() if ".c_attn." in name
    }
    torch.save(content, tmp_path / "a.pt")
    wda.convert(tmp_path / "a.pt", to, tmp_path / "b", base=base, given=given, progress=False)
    a, b = measured(tmp_path / "a.pt", base, given), measured(tmp_path / "b", base, Given())
    assert list(a.index) == list(b.index)
    assert {label for _, label in a.index} == {"query", "key", "value"}
    for column in ("delta_m", "delta_d"):
        assert b[column].tolist() == pytest.approx(a[column].tolist(), rel=1e-12, abs=1e-15)
        assert (a[column] > 1e-6).any()
