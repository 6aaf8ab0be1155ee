"""Every layout on disk gives the same numbers, and what is damaged is named."""

from __future__ import annotations

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import moved, pico_weights, save_model, save_pico_adapter
from safetensors.torch import save_file

import wda
from wda import engine
from wda.checkpoints import open_base, open_checkpoint, open_named_base
from wda.errors import (
    CheckpointError,
    LocationError,
    ManifestError,
    PairingError,
    SelectionError,
    WdaError,
)
from wda.locations import resolve


def numbers(checkpoint: Path, base: Path) -> list[tuple[str, float, float]]:
    table = wda.compare(checkpoint, base=base, progress=False).table
    return list(zip(table["module"], table["delta_m"], table["delta_d"], strict=True))


def save_sharded_safetensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    weight_map = {}
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def save_bin(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")


def save_old_bin(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def save_sharded_bin(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    weight_map = {}
    for i, name in enumerate(sorted(tensors)):
        file = f"pytorch_model-{i % 2 + 1:05d}-of-00002.bin"
        weight_map[name] = file
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name, where in weight_map.items() if where == file}
        torch.save(part, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "save", [save_sharded_safetensors, save_bin, save_old_bin, save_sharded_bin]
)
def test_full_layouts_agree(save: object, tmp_path: Path, base: Path) -> None:
    tensors = moved(pico_weights(), 0.01, seed=3)
    expected = numbers(save_model(tmp_path / "plain", tensors), base)
    save(tmp_path / "other", tensors)  # type: ignore[operator]
    assert numbers(tmp_path / "other", base) == expected
    assert len(expected) == 6
    assert all(delta_m > 0 and delta_d > 0 for _, delta_m, delta_d in expected)


def test_a_task_model_is_compared_with_its_bare_encoder(tmp_path: Path, base: Path) -> None:
    tensors = moved(pico_weights(), 0.01, seed=3)
    expected = numbers(save_model(tmp_path / "bare", tensors), base)
    prefixed = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    prefixed["classifier.weight"] = torch.randn(2, 12)
    assert numbers(save_model(tmp_path / "task", prefixed), base) == expected


def test_pickled_adapter_and_magnitude_spellings(tmp_path: Path, base: Path) -> None:
    tensors = save_pico_adapter(tmp_path / "plain", "dora")
    expected = numbers(tmp_path / "plain", base)
    respelled = {
        f"{name}.weight" if name.endswith("vector") else name: tensor
        for name, tensor in tensors.items()
    }
    respelled = {name: t[:, None] if "vector" in name else t for name, t in respelled.items()}
    save_pico_adapter(tmp_path / "other", "dora")
    (tmp_path / "other" / "adapter_model.safetensors").unlink()
    torch.save(respelled, tmp_path / "other" / "adapter_model.bin")
    assert numbers(tmp_path / "other", base) == expected


def test_mixed_dtypes_are_compared_and_recorded(tmp_path: Path, base: Path) -> None:
    half = pico_weights(dtype=torch.bfloat16)
    table = wda.compare(save_model(tmp_path / "half", half), base=base, progress=False).table
    assert set(table["dtype"]) == {"bfloat16"}
    assert set(table["base_dtype"]) == {"float32"}
    assert (table["delta_d"] > 0).all()  # what rounding to bfloat16 alone does
    assert (table["delta_d"] < 1e-4).all()


class RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_a_pickle_that_wants_to_run_code_does_not(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "evil"
    folder.mkdir()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(RunsCode(), file)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: this pickle wants to run code"):
        open_checkpoint(folder)
    torch.save({"a": RunsCode()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="wants to run code, which is never done"):
        open_checkpoint(folder)
    assert not (tmp_path / "executed").exists()


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(
        CheckpointError,
        match=r"no checkpoint here; expected checkpoint-<step> .* found notes.txt",
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 200])
def test_truncated_safetensors(keep: int, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "cut", pico_weights())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep] if keep < 200 else file.read_bytes()[:-keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read, truncated or"):
        open_checkpoint(folder)


def test_truncated_bin(tmp_path: Path) -> None:
    save_bin(tmp_path / "cut", pico_weights())
    file = tmp_path / "cut" / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: "):
        open_checkpoint(tmp_path / "cut")


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    save_sharded_safetensors(tmp_path / "m", pico_weights())
    for shard in (tmp_path / "m").glob("model-*.safetensors"):
        shard.unlink()
    with pytest.raises(CheckpointError, match=r"2 of 2 shards .*model-00001.*model-00002"):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(bad: float, tmp_path: Path, base: Path) -> None:
    tensors = moved(pico_weights(), 0.01, seed=3)
    tensors["encoder.layer.1.attention.self.value.weight"][2, 3] = bad
    folder = save_model(tmp_path / "nan", tensors)
    with pytest.raises(
        CheckpointError,
        match=r"nan: encoder.layer.1.attention.self.value holds NaN or Inf in 1 of 8",
    ):
        wda.compare(folder, base=base, progress=False)
    with pytest.raises(CheckpointError, match="nan: encoder.layer.1.*; a base with such numbers"):
        wda.compare(base, base=folder, progress=False)


def test_missing_tensors_are_all_named(tmp_path: Path, base: Path) -> None:
    tensors = {n: t for n, t in pico_weights().items() if "value" not in n or "layer.0" in n}
    folder = save_model(tmp_path / "lacking", tensors)
    with pytest.raises(
        PairingError, match=r"lacks .*layer.1.*value, .*layer.2.*value, which the base has"
    ):
        wda.compare(folder, base=base, progress=False)


def test_adapter_of_another_model(tmp_path: Path, base: Path) -> None:
    save_pico_adapter(tmp_path / "a")
    small = {n: t for n, t in pico_weights().items() if "layer.2" not in n}
    other = save_model(tmp_path / "two_layers", small)
    with pytest.raises(
        PairingError, match=r"changes encoder.layer.2.*query, .*value, which the base"
    ):
        wda.compare(tmp_path / "a", base=other, progress=False)
    wide = {n: torch.randn(t.shape[0], 13) if t.ndim == 2 else t for n, t in pico_weights().items()}
    with pytest.raises(
        PairingError, match=r"6 found.*query is 10×12, in the base 10×13 \(out×in\)"
    ):
        wda.compare(tmp_path / "a", base=save_model(tmp_path / "wide", wide), progress=False)
    foreign = save_model(tmp_path / "foreign", {"blocks.0.attn.weight": torch.randn(3, 4)})
    with pytest.raises(PairingError, match="is this the model it was fine-tuned from"):
        wda.compare(tmp_path / "a", base=foreign, progress=False)


def test_adapter_without_the_wanted_matrices(tmp_path: Path, base: Path) -> None:
    save_pico_adapter(tmp_path / "a")
    with pytest.raises(
        SelectionError, match="changes none of the matrices key; it changes query, value"
    ):
        wda.compare(tmp_path / "a", base=base, matrices=["key"], progress=False)
    comparison = wda.compare(tmp_path / "a", base=base, matrices=["key", "value"], progress=False)
    assert set(comparison.table["matrix"]) == {"value"}
    assert "leaves 3 of the 6 matrices alone (key)" in comparison.notes[0]


def rewrite_config(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is true but lora_magnitude_vector is missing for .*layer.0"),
        ({"peft_type": "LOHA"}, "alpha missing; the scaling needs it"),
        ({"lora_alpha": None}, "lora_alpha missing; the scaling needs it"),
        ({"r": 4}, "rank 3 in the file, 4 in the config"),
        ({"init_lora_weights": "corda"}, "'corda' changes the base weight in a way"),
        (
            {"layer_replication": [[0, 2], [1, 3]]},
            "layer_replication uses layer 1 of the base twice",
        ),
    ],
)
def test_adapter_configs_that_cannot_be_right(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    save_pico_adapter(tmp_path / "a")
    rewrite_config(tmp_path / "a", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "a")


def test_adapter_tensors_that_cannot_be_right(tmp_path: Path) -> None:
    tensors = save_pico_adapter(tmp_path / "a", "dora")
    file = tmp_path / "a" / "adapter_model.safetensors"
    first = "base_model.model.encoder.layer.0.attention.self.query"
    save_file({n: t for n, t in tensors.items() if n != f"{first}.lora_B.weight"}, file)
    with pytest.raises(CheckpointError, match=r"only one of the two exists for .*layer.0.*query"):
        open_checkpoint(tmp_path / "a")
    save_file(tensors | {f"{first}.lora_magnitude_vector": torch.ones(12)}, file)
    with pytest.raises(
        CheckpointError, match=r"wrong for .*query \(12 numbers for 10 output features\)"
    ):
        open_checkpoint(tmp_path / "a")
    save_file(tensors, file)
    rewrite_config(tmp_path / "a", use_dora=False)
    with pytest.raises(CheckpointError, match="has lora_magnitude_vector tensors but use_dora"):
        open_checkpoint(tmp_path / "a")


def test_ambiguous_folders_are_refused(tmp_path: Path) -> None:
    save_pico_adapter(tmp_path / "a")
    save_model(tmp_path / "a", pico_weights())
    with pytest.raises(CheckpointError, match=r"holds an adapter .* and a whole model"):
        open_checkpoint(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="adapter_config.json without weights"):
        open_checkpoint(tmp_path / "a")
    lora = {"base.lora_A.weight": torch.randn(2, 3)}
    with pytest.raises(CheckpointError, match="adapter weights .* under the name of a whole model"):
        open_checkpoint(save_model(tmp_path / "b", lora))


def test_tensors_nobody_reads_are_named(tmp_path: Path, base: Path) -> None:
    tensors = save_pico_adapter(tmp_path / "a")
    tensors["base_model.model.embeddings.other"] = torch.randn(3, 40)
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    comparison = wda.compare(tmp_path / "a", base=base, progress=False)
    assert comparison.notes == ("a: tensors that were not read: base_model.model.embeddings.other",)


def test_a_base_is_a_whole_model(tmp_path: Path) -> None:
    save_pico_adapter(tmp_path / "a")
    with pytest.raises(CheckpointError, match="is a PEFT adapter; the base must be a whole model"):
        open_base(tmp_path / "a")


def test_the_base_an_adapter_names_is_found(runs: dict[str, Path], tmp_path: Path) -> None:
    assert len(wda.compare(runs["lora"], progress=False).table) == 18
    with pytest.raises(WdaError, match="base: .* give it with --base"):
        wda.compare(runs["ft"], progress=False)
    save_pico_adapter(tmp_path / "b", base_model_name_or_path="elsewhere/base")
    with pytest.raises(WdaError, match="the adapters name several bases"):
        wda.compare([runs["lora"], tmp_path / "b"], progress=False)


def test_vectors_without_direction_are_counted_and_said_once(tmp_path: Path) -> None:
    weights = pico_weights()
    weights["encoder.layer.1.attention.self.query.weight"][[2, 5]] = 0
    base = save_model(tmp_path / "base", weights)
    folders = [save_model(tmp_path / n, moved(weights, 0.01, seed=i)) for i, n in enumerate("ab")]
    comparison = wda.compare(folders, base=base, matrices="query", progress=False)
    assert comparison.table["n_undirected"].sum() == 4
    assert comparison.table["delta_d"].notna().all()
    (note,) = (note for note in comparison.notes if "below_floor" not in note)
    assert "have no direction and are left out of ΔD: 4 in 2 rows" in note


def test_a_base_that_is_gone_is_asked_for(tmp_path: Path) -> None:
    save_pico_adapter(tmp_path / "a", base_model_name_or_path="/old/disk/llama")
    with pytest.raises(WdaError, match="name /old/disk/llama as their base.*give it with --base"):
        wda.compare(tmp_path / "a", progress=False)


def test_a_new_head_is_named(tmp_path: Path, base: Path) -> None:
    tensors = moved(pico_weights(), 0.01, seed=3) | {"classifier.weight": torch.randn(2, 12)}
    comparison = wda.compare(save_model(tmp_path / "ft", tensors), base=base, progress=False)
    assert comparison.notes == ("ft: not compared, for the base has none: classifier",)


def test_a_step_folder_without_weights_is_named(runs: dict[str, Path]) -> None:
    (runs["lora"] / "checkpoint-500").mkdir()
    with pytest.raises(
        CheckpointError, match="checkpoint-500: no checkpoint here.* an empty folder"
    ):
        wda.compare(runs["lora"], progress=False)


def test_vectors_and_stacks_that_a_pattern_chooses_are_named(tmp_path: Path) -> None:
    query = "encoder.layer.0.attention.self.query.weight"
    tensors = {
        query: torch.randn(4, 6),
        "encoder.layer.0.LayerNorm.weight": torch.randn(6),
        "encoder.conv.weight": torch.randn(3, 4, 5),
        "encoder.layer.0.experts": torch.randn(2, 3, 4),
        "encoder.layer.0.attention.self.query.bias": torch.randn(4),
    }
    base = save_model(tmp_path / "base", tensors)
    run = save_model(tmp_path / "a", moved(tensors, 0.1, seed=1))
    comparison = wda.compare(run, base=base, matrices="re:.*", progress=False)
    kernel, matrix = comparison.table.itertuples()
    assert (kernel.module, kernel.out_features, kernel.in_features) == ("encoder.conv", 3, 20)
    assert matrix.module == query.removesuffix(".weight")
    (note,) = comparison.notes
    assert note.startswith("left out of re:.*: 2 tensors that are no matrices: ")
    assert "encoder.layer.0.LayerNorm.weight (6)" in note
    for word, named in (
        ("LayerNorm", "Norm.weight"),
        ("experts", "ex"),
    ):
        with pytest.raises(SelectionError, match=f"{named}.*need two dimensions"):
            wda.compare(run, base=base, matrices=word, progress=False)


def test_files_that_change_or_vanish_while_they_are_read(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = engine.moved

    def disturbed(*arguments: Any) -> Any:
        found = measured(*arguments)
        disturb()
        return found

    def rewrite() -> None:
        other = save_model(tmp_path / "other", moved(pico_weights(), 0.2, seed=2))
        (other / "model.safetensors").replace(run / "model.safetensors")

    def delete() -> None:
        (run / "model.safetensors").unlink(missing_ok=True)

    def rewrite_base() -> None:
        save_model(tmp_path / "again", pico_weights(seed=3))
        (tmp_path / "again" / "model.safetensors").replace(base / "model.safetensors")

    monkeypatch.setattr(engine, "moved", disturbed)
    for what, message in (
        (rewrite, "run.model.safetensors: changed while it was read; compare again"),
        (delete, "run.model.safetensors: was deleted while it was read; compare again"),
        (rewrite_base, "base.model.safetensors: changed while it was read"),
    ):
        run = save_model(tmp_path / "run", moved(pico_weights(), 0.1, seed=1))
        disturb = what
        # What is under way when the first unit fails goes on; here it must not into the next case.
        with ThreadPoolExecutor(1) as threads, pytest.raises(CheckpointError, match=message):
            wda.compare(run, base=base, cache=False, executor=threads, progress=False)


def test_the_base_is_the_given_one_or_the_one_that_is_named(
    tmp_path: Path, base: Path, runs: dict[str, Path]
) -> None:
    of_lora, of_dora, of_ft = (
        open_checkpoint(runs[method] / "checkpoint-9") for method in ("lora", "dora", "ft")
    )
    location, opened = open_named_base([of_lora, of_ft, of_dora])
    assert (location, opened.path) == (str(base), base)
    other = save_model(tmp_path / "other", pico_weights(1))
    assert open_named_base([of_lora], other)[1].path == other
    assert open_named_base([of_ft], other, resolve)[0] == str(other)
    with pytest.raises(LocationError, match="is not known, for none of these checkpoints names it"):
        open_named_base([of_ft])
    with pytest.raises(CheckpointError, match="is a PEFT adapter; the base must be a whole model"):
        open_named_base([], runs["lora"] / "checkpoint-9")
    of_dora.base = str(other)
    with pytest.raises(ManifestError, match="the adapters name several bases"):
        open_named_base([of_lora, of_dora])
    of_dora.base = str(tmp_path / "gone")
    with pytest.raises(LocationError, match=r"name .*gone as their base, which is not to be had"):
        open_named_base([of_dora])
