"""What W0 is of adapters trained on a quantised model: `--w0 original` and `--w0 dequantized`."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import wda_command
from safetensors.torch import load_file, save_file

import wda
from wda.checkpoints import Given, TrainedOn, open_base, open_checkpoint
from wda.diagnosis import diagnose
from wda.errors import ManifestError
from wda.manifest import make_manifest
from wda.origins import notes_on_origins
from wda.runs import open_runs

FIXTURES = Path(__file__).parent / "fixtures"
RANK, ALPHA = 3, 7
MODULES = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")]


def original(fixture: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / fixture / "base" / "model.safetensors")


def dequantised(fixture: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / fixture / "truth.safetensors")


def adapter(folder: Path, fixture: str, dora: bool, **config: Any) -> Path:
    """An adapter trained on the fixture's quantised model, which it names."""
    g, tensors = torch.Generator().manual_seed(2), {}
    weights = dequantised(fixture)
    for module in MODULES:
        rows, columns = weights[f"{module}.weight"].shape
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=g)
        tensors[f"{name}.lora_B.weight"] = 0.01 * torch.randn(rows, RANK, generator=g)
        if dora:
            spread = 1 + 0.1 * torch.randn(rows, generator=g)
            norm = weights[f"{module}.weight"].float().norm(dim=1)
            tensors[f"{name}.lora_magnitude_vector"] = norm * spread
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    named = str(FIXTURES / fixture / "checkpoint")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "use_dora": dora,
        "base_model_name_or_path": named,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


def truth(folder: Path, w0: torch.Tensor, start: torch.Tensor, module: str) -> tuple[float, float]:
    """ΔM and ΔD in float64 from what the adapter makes of the weights it was trained on."""
    held = load_file(folder / "adapter_model.safetensors")
    name = f"base_model.model.{module}"
    A, B = (held[f"{name}.lora_{x}.weight"].double() for x in "AB")
    wt = start.double() + ALPHA / RANK * B @ A
    if (m := held.get(f"{name}.lora_magnitude_vector")) is not None:
        wt = wt / wt.norm(dim=1, keepdim=True) * m.double()[:, None]
    w0 = w0.double()
    cosine = (w0 * wt).sum(dim=1) / (w0.norm(dim=1) * wt.norm(dim=1))
    return float((wt.norm(dim=1) - w0.norm(dim=1)).abs().mean()), float((1 - cosine).mean())


@pytest.mark.parametrize("fixture", ["nf4_double", "int8", "gptq"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("w0", ["original", "dequantized"])
def test_the_choice_of_w0(w0: str, dora: bool, fixture: str, tmp_path: Path) -> None:
    run = adapter(tmp_path / "adapter", fixture, dora)
    base = FIXTURES / fixture / ("base" if w0 == "original" else "checkpoint")
    comparison = wda.compare(run, base, w0=w0, cache=False, progress=False)  # type: ignore[arg-type]
    start = dequantised(fixture)
    begin = original(fixture) if w0 == "original" else start
    assert len(comparison.table) == len(MODULES)
    for row in comparison.table.itertuples():
        name = f"{row.module}.weight"
        expected = truth(run, begin[name], start[name].float(), str(row.module))
        assert (row.delta_m, row.delta_d) == pytest.approx(expected, rel=1e-6)
        assert row.method == ("qdora" if dora else "qlora")
    assert comparison.provenance["w0"] == w0
    # Where nothing is said, W0 are the weights of the base as they mean.
    if w0 == "dequantized":
        again = wda.compare(run, base, cache=False, progress=False)
        assert again.table.equals(comparison.table)
        assert again.provenance["w0"] == "dequantized"


def test_quantisation_is_in_the_change_only_where_w0_is_the_original(tmp_path: Path) -> None:
    run = adapter(tmp_path / "adapter", "nf4_double", dora=False)
    file = run / "adapter_model.safetensors"
    still = {n: torch.zeros_like(t) if "_B" in n else t for n, t in load_file(file).items()}
    save_file(still, file)
    folder = FIXTURES / "nf4_double"
    own = wda.compare(run, folder / "checkpoint", cache=False, progress=False).table
    assert (own.delta_d == 0).all()
    first = wda.compare(run, folder / "base", w0="original", cache=False, progress=False).table
    assert (first.delta_d > 1e-4).all()


def test_results_depend_on_both_models(tmp_path: Path) -> None:
    run = adapter(tmp_path / "adapter", "nf4_double", dora=True)
    base = FIXTURES / "nf4_double" / "base"
    on = [FIXTURES / name / "checkpoint" for name in ("nf4_double", "fp4")]
    tables = [
        wda.compare(
            run,
            base,
            cache=tmp_path / "cache",
            given=Given(trained_on=str(model)),
            w0="original",
            progress=False,
        ).table
        for model in (*on, on[0])
    ]
    assert not tables[0].delta_d.equals(tables[1].delta_d)
    assert tables[0].equals(tables[2])
    adapter_, model = open_checkpoint(run), open_base(on[0])
    there = pickle.loads(pickle.dumps(TrainedOn(adapter_, model)))  # type: ignore[arg-type]
    assert there.meaning(MODULES[0]) == TrainedOn(adapter_, model).meaning(MODULES[0])  # type: ignore[arg-type]


NOWHERE = "org/model-bnb-4bit"


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (str(FIXTURES / "nf4_double" / "checkpoint"), "the quantised "),
        (NOWHERE, "by its name a quantised model"),
        ("org/model-GPTQ-Int4@main", "by its name a quantised model"),
        (str(FIXTURES / "nf4_double" / "base"), None),
        ("org/gemma-3-1b-it-qat-int4-unquantized", None),
        ("org/model-8B", None),
        (None, None),
    ],
)
def test_an_unquantised_base_that_the_training_never_saw_is_told(
    named: str | None, said: str | None, tmp_path: Path
) -> None:
    run = adapter(tmp_path / "a", "nf4_double", dora=True, base_model_name_or_path=named)
    member = open_runs(make_manifest(str(run)).runs)
    base, packed = (open_base(FIXTURES / "nf4_double" / name) for name in ("base", "checkpoint"))
    notes = notes_on_origins(member, base, None)
    assert len(notes) == (said is not None)
    assert all(note.startswith("a: was trained on ") and (said or "") in note for note in notes)
    for chosen in ("original", "dequantized"):
        assert notes_on_origins(member, base, chosen) == []  # type: ignore[arg-type]
    assert notes_on_origins(member, packed, None) == []
    found = {f.check: f for f in diagnose(run, base.path, progress=False)}
    told = found.get("W0 is what it was trained on")
    assert (told is not None) == (said is not None)
    assert told is None or (told.verdict == "suspicious" and told.advice.startswith("give that"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        wda.merge(run, tmp_path / "out", base.path, progress=False)
    assert any("was trained on" in str(w.message) for w in caught) == (said is not None)
    compared = wda.compare(run, base.path, null=None, progress=False)
    assert any(note in compared.notes for note in notes) == (said is not None)


def test_a_merge_on_other_weights_is_told_of_in_one_plain_line(tmp_path: Path) -> None:
    run = adapter(
        tmp_path / "a", "nf4_double", dora=True, base_model_name_or_path="org/llama-bnb-4bit"
    )
    base = FIXTURES / "nf4_double" / "base"
    done = wda_command("merge", run, "--base", base, "--out", "merged", cwd=tmp_path)
    assert done.returncode == 0
    (line,) = (line for line in done.stderr.splitlines() if "was trained on" in line)
    assert "UserWarning" not in done.stderr
    assert "by its name a quantised model" in line


def test_the_packed_base_beside_the_factors_tells(tmp_path: Path) -> None:
    run = adapter(tmp_path / "a", "nf4_double", dora=False, base_model_name_or_path=None)
    file = run / "adapter_model.safetensors"
    held = load_file(FIXTURES / "nf4_double" / "checkpoint" / "model.safetensors")
    beside = {
        f"base_model.model.{MODULES[0]}.base_layer{n.removeprefix(MODULES[0])}": t
        for n, t in held.items()
        if n.startswith(f"{MODULES[0]}.weight")
    }
    save_file({**load_file(file), **beside}, file)
    members = open_runs(make_manifest(str(run)).runs)
    (note,) = notes_on_origins(members, open_base(FIXTURES / "nf4_double" / "base"), None)
    assert "the nf4 weights that lie beside its factors" in note


def test_what_the_choice_needs_is_said(tmp_path: Path) -> None:
    run = adapter(tmp_path / "adapter", "nf4_double", dora=False)
    folder = FIXTURES / "nf4_double"

    def compare(w0: Any, base: Path, run: Path = run, trained_on: str | None = None) -> None:
        given = Given(trained_on=trained_on)
        wda.compare(run, base, w0=w0, given=given, cache=False, progress=False)

    with pytest.raises(ManifestError, match=r"is nf4; give the original model with --base"):
        compare("original", folder / "checkpoint")
    with pytest.raises(ManifestError, match=r"is not quantised; give the quantised model with --b"):
        compare("dequantized", folder / "base")
    with pytest.raises(ManifestError, match=r"base: is not quantised; give .* --trained-on"):
        compare("original", folder / "base", trained_on=str(folder / "base"))
    with pytest.raises(ManifestError, match="AWQ, which moves scales"):
        compare("original", folder / "base", trained_on=str(FIXTURES / "awq" / "checkpoint"))
    nameless = adapter(tmp_path / "b", "nf4_double", dora=False, base_model_name_or_path=None)
    with pytest.raises(ManifestError, match="names no model it was trained on"):
        compare("original", folder / "base", nameless)
