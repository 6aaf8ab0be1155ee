"""Adapters as llama.cpp has them: what peft merges, converted by the rules of its converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_full_layouts import maker

import wda
from wda.checkpoints import Given, open_base, open_checkpoint
from wda.errors import CheckpointError
from wda.naming import find_matrices

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

RANK, ALPHA = 4, 6
SHAPES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 30,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "embed_tokens"]


def of_llama_cpp(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Order the rows of a llama's queries or keys as its converter does."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def convert(adapter: Path, file: Path, architecture: str, **said: Any) -> None:
    """Write an adapter as convert_lora_to_gguf.py does."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    kinds = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], SHAPES["num_hidden_layers"])
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(said.get("type", "adapter"))
    writer.add_string(gguf.Keys.Adapter.TYPE, said.get("kind", "lora"))
    if (alpha := said.get("alpha", config["lora_alpha"])) is not None:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    if "invoked" in said:
        writer.add_array(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, said["invoked"])
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        path, _, factor = name.removeprefix("base_model.model.").rpartition(".lora_")
        if not path:
            continue  # the frozen table of an embedding
        which, value = factor.removeprefix("embedding_")[0].lower(), tensor.float()
        if architecture == "llama" and which == "b" and path.endswith((".q_proj", ".k_proj")):
            key = "num_attention_heads" if path.endswith("q_proj") else "num_key_value_heads"
            value = of_llama_cpp(value, SHAPES[key])
        if path.endswith("embed_tokens") and which == "a":
            value = value.T
        data = np.ascontiguousarray(value.numpy())
        writer.add_tensor(f"{names.get_name(path)}.weight.lora_{which}", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def trained(folder: Path, kind: str, **settings: Any) -> dict[str, torch.Tensor]:
    """Save a base and an adapter; give the weights as peft merges them."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **SHAPES)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    said = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**said))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "adapter")
    return dict(adapted.double().merge_and_unload().state_dict())


def agree(folder: Path, truth: dict[str, torch.Tensor], **given: Any) -> None:
    table = wda.compare(
        folder / "lora.gguf",
        folder / "base",
        matrices="re:.*",
        cache=False,
        progress=False,
        given=Given(**given),
    ).table
    base = load_file(folder / "base" / "model.safetensors")
    changed = {n for n in base if not torch.allclose(base[n].double(), truth[n], atol=1e-12)}
    assert {f"{module}.weight" for module in table["module"]} == changed
    for row in table.itertuples():
        w0, wt = base[f"{row.module}.weight"].double(), truth[f"{row.module}.weight"]
        expected = wda.decompose(w0, wt)
        assert row.delta_m == pytest.approx(expected.delta_m, rel=1e-6)
        assert row.delta_d == pytest.approx(expected.delta_d, rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2"])
def test_the_table_is_that_of_pefts_merged_weights(kind: str, tmp_path: Path) -> None:
    truth = trained(tmp_path, kind)
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", kind)
    checkpoint = open_checkpoint(tmp_path / "lora.gguf")
    assert (checkpoint.layout, checkpoint.method) == ("LoRA of llama.cpp", "lora")
    assert (checkpoint.unread, checkpoint.quantised) == ((), None)
    agree(tmp_path, truth)


def test_factors_merged_in_llama_cpps_order_are_what_transformers_reads(tmp_path: Path) -> None:
    """B·A added to a GGUF of the base, in the order of the file, and read as transformers does."""
    trained(tmp_path, "llama", target_modules=["q_proj", "k_proj"])
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", "llama")
    write = maker("gguf_file")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    write.OF_MATRIX = dict.fromkeys(write.OF_MATRIX, gguf.GGMLQuantizationType.F32)
    write.write(tmp_path / "base.gguf", model)
    factors = {t.name: t.data.copy() for t in gguf.GGUFReader(tmp_path / "lora.gguf").tensors}
    merged = gguf.GGUFReader(tmp_path / "base.gguf", "r+")
    for tensor in merged.tensors:
        if (a := factors.get(f"{tensor.name}.lora_a")) is not None:
            tensor.data[:] += ALPHA / RANK * factors[f"{tensor.name}.lora_b"] @ a
    del merged
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="base.gguf", dtype=torch.float32
    ).state_dict()
    base, adapter = open_base(tmp_path / "base"), open_checkpoint(tmp_path / "lora.gguf")
    matrices = {m.module: m for m in find_matrices(base.tensors.shapes)}
    assert len(adapter.modules) == 4
    for module in adapter.modules:
        w0 = base.weight(module, matrices[module])
        for rows in (slice(None), slice(5, 9)):
            update = adapter.update(module, matrices[module], base, rows)
            wt = w0[rows].double() + update.delta(w0[rows].double(), slice(None))
            expected = theirs[f"{module}.weight"][rows].double()
            torch.testing.assert_close(wt, expected, rtol=1e-5, atol=1e-6)


def test_merged_and_converted_they_say_the_same(tmp_path: Path) -> None:
    truth = trained(tmp_path, "llama", target_modules=["q_proj", "k_proj", "v_proj"])
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", "llama")
    file, base = tmp_path / "lora.gguf", tmp_path / "base"
    wda.merge(file, tmp_path / "merged", base, progress=False)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in written.items():
        torch.testing.assert_close(weight.double(), truth[name], rtol=1e-6, atol=1e-7)
    wda.convert(file, "peft", tmp_path / "peft", base, progress=False)
    held = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for name, factor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(held[name], factor), name


def test_the_scaling_is_llama_cpps(tmp_path: Path) -> None:
    truth = trained(tmp_path, "qwen2", lora_alpha=RANK)
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", "qwen2", alpha=0)
    agree(tmp_path, truth)  # s = 1
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", "qwen2", alpha=None)
    with pytest.raises(CheckpointError, match=r"no adapter\.lora\.alpha, which the scaling needs"):
        open_checkpoint(tmp_path / "lora.gguf")
    agree(tmp_path, truth, alpha=RANK)
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", "qwen2", alpha=99)
    agree(tmp_path, truth, alpha=RANK)


def test_what_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, "llama")
    file = tmp_path / "lora.gguf"
    convert(tmp_path / "adapter", file, "llama", kind="control_vector")
    with pytest.raises(CheckpointError, match="'control_vector'; 'lora' that holds"):
        open_checkpoint(file)
    convert(tmp_path / "adapter", file, "llama", invoked=[3, 4])
    with pytest.raises(CheckpointError, match="switched on by some tokens"):
        open_checkpoint(file)
    convert(tmp_path / "adapter", file, "llama")
    config = tmp_path / "base" / "config.json"
    said = json.loads(config.read_text())
    for changes, why in (
        ({"head_dim": None, "hidden_size": None}, "not known"),
        ({"head_dim": 5}, "5"),
    ):
        config.write_text(json.dumps(said | changes))
        with pytest.raises(CheckpointError, match=f"by heads of .*{why}, and"):
            wda.compare(file, tmp_path / "base", cache=False, progress=False)
