"""`wda merge` against peft's own merge, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_peft import BERT, GPT2, LLAMA, trained_adapter
from typer.testing import CliRunner

import wda
from wda.cli import app
from wda.errors import CheckpointError, OutputError, PairingError
from wda.merging import merge
from wda.safetensors_writing import ToWrite, write_safetensors

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (LLAMA, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "dora": (BERT, {"target_modules": ["query", "value", "dense"], "use_dora": True}),
    "conv1d dora": (
        GPT2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "whole and biases": (
        BERT,
        {"target_modules": ["query"], "modules_to_save": ["key"], "bias": "lora_only"},
    ),
}


def peft_merged(adapted: Any) -> dict[str, torch.Tensor]:
    return dict(adapted.double().merge_and_unload().state_dict())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_is_pefts(case: str, tmp_path: Path) -> None:
    config, settings = CASES[case]
    adapted, run = trained_adapter(config, settings, tmp_path)
    done = merge(run / "checkpoint-7", tmp_path / "out", tmp_path / "base", progress=False)
    truth = peft_merged(adapted)
    written = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert set(written) == set(base)
    for name, wt in written.items():
        assert wt.dtype == base[name].dtype
        assert torch.allclose(wt.double(), truth[name], rtol=1e-6, atol=1e-9), name
    changed = {name for name in base if not torch.equal(base[name], written[name])}
    modules = {one.module for one in done}
    assert modules == {name.removesuffix(".weight") for name in changed if base[name].ndim == 2}
    for one in done:
        w0, wt = base[f"{one.module}.weight"].double(), truth[f"{one.module}.weight"]
        assert one.relative_update == pytest.approx(float((wt - w0).norm() / w0.norm()), rel=1e-5)
        assert 0 <= one.error < 1e-4
    assert sum(one.error for one in done) > 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(6)[None]
    assert torch.allclose(
        loaded.double()(tokens).logits,
        adapted.double().eval()(tokens).logits,
        rtol=1e-4,
        atol=1e-6,
    )


def test_numbers_that_went_into_the_forms_need_no_place(tmp_path: Path) -> None:
    """α beside the factors, as sd-scripts stores it, is in the merged weights."""
    fixture = Path(__file__).parent / "fixtures" / "lycoris-4.1"
    file = tmp_path / "only.safetensors"
    held = load_file(fixture / "checkpoint.safetensors")
    save_file({n: t for n, t in held.items() if not n.endswith(("diff_b", "_norm"))}, file)
    merge(file, tmp_path / "out", fixture / "base", progress=False)
    written = load_file(next((tmp_path / "out").glob("*.safetensors")))
    truth = load_file(fixture / "truth.safetensors")
    changed = [name for name in truth if name.endswith(".weight") and truth[name].ndim > 1]
    assert changed
    for name in changed:
        assert torch.allclose(written[name].double(), truth[name].double(), rtol=1e-5, atol=1e-7)


def bf16_shards(tmp_path: Path) -> tuple[Any, Path]:
    """A base in bf16, in several shards, and an adapter of it."""
    adapted, run = trained_adapter(LLAMA, {"target_modules": ["q_proj", "v_proj"]}, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return adapted, run


def test_shards_and_dtype_are_the_bases_and_the_rounding_is_measured(tmp_path: Path) -> None:
    _, run = bf16_shards(tmp_path)
    (tmp_path / "sharded" / "LICENSE").write_text("free")
    done = merge(run / "checkpoint-7", tmp_path / "out", tmp_path / "sharded", progress=False)
    one, other = (
        {f.name: load_file(f) for f in (tmp_path / folder).glob("*.safetensors")}
        for folder in ("sharded", "out")
    )
    assert {f: set(t) for f, t in one.items()} == {f: set(t) for f, t in other.items()}
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    before = {name: t for tensors in one.values() for name, t in tensors.items()}
    after = {name: t for tensors in other.values() for name, t in tensors.items()}
    exact = wda.merge(
        run / "checkpoint-7", tmp_path / "wide", widened(tmp_path, before), progress=False
    )
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    for m in done:
        name = f"{m.module}.weight"
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], wide[name].to(torch.bfloat16))
        lost = (after[name].double() - wide[name]).norm()
        update = (wide[name] - before[name].double()).norm()
        assert m.error == pytest.approx(float(lost / update), rel=1e-9)
        assert m.error > 1e-3
    assert all(m.error == 0 for m in exact)


def widened(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The same base in float64, where nothing is lost."""
    folder = tmp_path / "float64"
    folder.mkdir()
    save_file({n: t.double() for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


def test_blocks_of_rows_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = trained_adapter(BERT, {"target_modules": ["query"], "use_dora": True}, tmp_path)
    merge(run / "checkpoint-7", tmp_path / "one", tmp_path / "base", progress=False)
    monkeypatch.setattr("wda.merging._BLOCK_ELEMENTS", 24 * 5)
    merge(run / "checkpoint-7", tmp_path / "two", tmp_path / "base", progress=False)
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_cannot_be_merged_right_is_refused(tmp_path: Path) -> None:
    _, run = trained_adapter(BERT, {"target_modules": ["query"]}, tmp_path)
    adapter, base, out = run / "checkpoint-7", tmp_path / "base", tmp_path / "out"
    with pytest.raises(CheckpointError, match="is a whole model and no adapter"):
        merge(base, out, base, progress=False)
    with pytest.raises(OutputError, match="is the base itself"):
        merge(adapter, base, base, progress=False)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.surprise.weight": torch.ones(3)}, file)
    with pytest.raises(CheckpointError, match=r"surprise\.weight have no place in the base"):
        merge(adapter, out, base, progress=False)
    # A weight beside its factors may be W0, or have them merged into it.
    beside = next(n for n in tensors if n.endswith("lora_A.weight")).replace("lora_A.", "")
    w0 = load_file(base / "model.safetensors")[beside.removeprefix("base_model.model.")]
    save_file(tensors | {beside: w0}, file)
    with pytest.raises(CheckpointError, match=r"query\.weight have no place in the base"):
        merge(adapter, out, base, progress=False)
    renamed = {n.replace("layer.1.", "layer.7."): t for n, t in tensors.items()}
    save_file(renamed, file)
    with pytest.raises(PairingError, match=r"layer\.7.*query, which the base"):
        merge(adapter, out, base, progress=False)
    broken = {n: t.fill_(torch.nan) if "lora_B" in n else t for n, t in tensors.items()}
    save_file(broken, file)
    with pytest.raises(CheckpointError, match="merges to NaN or Inf"):
        merge(adapter, out, base, progress=False)
    fixture = Path(__file__).parent / "fixtures" / "nf4_double"
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"is nf4, and merged weights do not fit"):
        merge(adapter, out, fixture / "checkpoint", progress=False)
    parts = load_file(base / "model.safetensors") | {
        "normed.weight_g": torch.ones(3, 1),
        "normed.weight_v": torch.ones(3, 5),
    }
    save_file(parts, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"in parts or stacks \(normed\.weight\)"):
        merge(adapter, out, base, progress=False)
    assert not out.exists()


def test_the_command_prints_what_each_matrix_lost(tmp_path: Path) -> None:
    _, run = bf16_shards(tmp_path)
    arguments = ["merge", str(run / "checkpoint-7"), "--base", str(tmp_path / "sharded")]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    assert "lost to rounding" in done.output
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "b"), "--json"])
    told = json.loads(done.stdout)
    assert len(told) == 6
    assert all(0 < one["error"] < 1 for one in told)


def test_files_are_written_tensor_by_tensor(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.int64).view(2, 3),
        "b": torch.randn(3, 5).to(torch.bfloat16),
        "c": torch.randn(7).double(),
        "d": torch.tensor(2.5),
        "e": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
    }
    file = tmp_path / "x.safetensors"
    write_safetensors(
        file, [ToWrite(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()]
    )
    again = load_file(file)
    assert set(again) == set(tensors)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
