"""`wda doctor`: every defect it looks for, made on purpose, and none found where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from wda.cli import app
from wda.diagnosis import Finding, diagnose
from wda.errors import LocationError

HIDDEN, HEADS, KEY_HEADS, RANK, ALPHA = 48, 4, 2, 3, 6
SHAPES = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN // 2, HIDDEN), "v_proj": (24, HIDDEN)}
MODULES = [f"model.layers.{i}.self_attn.{name}" for i in range(3) for name in SHAPES]
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
}
Tensors = dict[str, torch.Tensor]


def shape_of(module: str) -> tuple[int, int]:
    return SHAPES[module.rpartition(".")[2]]


def base_weights(seed: int = 0) -> Tensors:
    """Weights whose rows and columns differ in length as those of a trained model do."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for module in MODULES:
        rows, columns = shape_of(module)
        spread = torch.exp(0.4 * torch.randn(rows, 1, generator=g))
        across = torch.exp(0.4 * torch.randn(1, columns, generator=g))
        found[f"{module}.weight"] = 0.05 * spread * across * torch.randn(rows, columns, generator=g)
    return found


def adapter_weights(base: Tensors, size: float = 0.02) -> Tensors:
    g = torch.Generator().manual_seed(5)
    found = {}
    for module in MODULES:
        (rows, columns), w0 = shape_of(module), base[f"{module}.weight"]
        name = f"base_model.model.{module}"
        A = torch.randn(RANK, columns, generator=g)
        B = size / RANK * torch.randn(rows, RANK, generator=g)
        found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = A, B
        moved = 1 + 0.03 * torch.randn(rows, generator=g)
        v = w0 + ALPHA / RANK * B @ A
        found[f"{name}.lora_magnitude_vector"] = v.norm(dim=1) * moved
    return found


def save_model(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def save_adapter(folder: Path, tensors: Tensors, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    dora = any("magnitude" in name for name in tensors)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_dora": dora} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def doctor(tmp_path: Path, adapter: Tensors, base: Tensors, **changes: Any) -> dict[str, Finding]:
    where = save_adapter(tmp_path / "adapter", adapter, **changes)
    found = diagnose(where, save_model(tmp_path / "base", base), progress=False)
    return {finding.check: finding for finding in found}


def without_magnitudes(adapter: Tensors) -> Tensors:
    return {name: t for name, t in adapter.items() if "magnitude" not in name}


def magnitudes(adapter: Tensors, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Tensors:
    def new(name: str, tensor: torch.Tensor) -> torch.Tensor:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        return change(module, tensor) if "magnitude" in name else tensor

    return {name: new(name, tensor) for name, tensor in adapter.items()}


@pytest.mark.parametrize("method", ["lora", "dora", "ft"])
def test_a_sound_checkpoint_is_found_sound(method: str, tmp_path: Path) -> None:
    base = base_weights()
    if method == "ft":
        g = torch.Generator().manual_seed(3)
        moved = {n: t + 0.001 * torch.randn(t.shape, generator=g) for n, t in base.items()}
        run = save_model(tmp_path / "ft", moved)
        found = diagnose(run, save_model(tmp_path / "base", base), progress=False)
    else:
        adapter = adapter_weights(base)
        adapter = adapter if method == "dora" else without_magnitudes(adapter)
        found = list(doctor(tmp_path, adapter, base).values())
    assert {finding.verdict for finding in found} == {"ok"}
    assert len(found) == {"ft": 6, "lora": 7, "dora": 9}[method]
    assert not any(finding.advice for finding in found)


def test_biases_beside_an_adapter_are_no_reason_for_suspicion(tmp_path: Path) -> None:
    base = base_weights()
    adapter = adapter_weights(base)
    vectors = {
        f"base_model.model.{name}": torch.ones(3) for name in ("x.bias", "final_norm.weight")
    }
    found = doctor(tmp_path, adapter | vectors, base)["all tensors are read"]
    assert (found.verdict, found.number.partition(":")[0]) == ("ok", "not 2")
    stray = {"base_model.model.x.lora_other": torch.ones(3)}
    found = doctor(tmp_path, adapter | vectors | stray, base)["all tensors are read"]
    assert (found.verdict, found.number.partition(":")[0]) == ("suspicious", "not 3")


def test_magnitudes_that_never_moved(tmp_path: Path) -> None:
    base = base_weights()
    frozen = magnitudes(
        adapter_weights(base), lambda m, _: base[f"{m}.weight"].norm(dim=1).bfloat16().float()
    )
    found = doctor(tmp_path, frozen, base)
    assert found["magnitudes moved"].verdict == "wrong"
    assert "train again" in found["magnitudes moved"].advice or "needed" in (
        found["magnitudes moved"].advice
    )
    assert found["magnitudes fit W0"].verdict == "ok"


def test_magnitudes_of_the_other_axis_of_a_square_matrix(tmp_path: Path) -> None:
    base = base_weights()
    turned = magnitudes(
        adapter_weights(base),
        lambda m, t: base[f"{m}.weight"].norm(dim=0) * 1.02 if "q_proj" in m else t,
    )
    found = doctor(tmp_path, turned, base)["magnitudes fit W0"]
    assert found.verdict == "wrong"
    assert "3 of 9 do not fit" in found.number
    assert "other axis" in found.advice


def test_magnitudes_of_a_random_layer(tmp_path: Path) -> None:
    base, other = base_weights(), base_weights(seed=9)
    random = magnitudes(adapter_weights(base), lambda m, _: other[f"{m}.weight"].norm(dim=1))
    found = doctor(tmp_path, random, base)["magnitudes fit W0"]
    assert (found.verdict, "random layer" in found.advice) == ("wrong", True)
    assert "9 of 9 do not fit" in found.number


def in_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Put rows into the order in which rotary embeddings turn neighbours."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def test_magnitudes_in_the_order_of_another_layout(tmp_path: Path) -> None:
    base = base_weights()
    heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}
    moved = magnitudes(
        adapter_weights(base),
        lambda m, t: in_pairs(t, heads[n]) if (n := m.rpartition(".")[2]) in heads else t,
    )
    found = doctor(tmp_path, moved, base)["magnitudes fit W0"]
    assert (found.verdict, "order of another layout" in found.advice) == ("wrong", True)
    assert "6 of 9 do not fit" in found.number


def test_rows_of_a_whole_model_in_the_order_of_another_layout(tmp_path: Path) -> None:
    base = base_weights()
    heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}
    moved = {
        name: in_pairs(t, heads[n]) if (n := name.split(".")[-2]) in heads else t + 1e-4
        for name, t in base.items()
    }
    run = save_model(tmp_path / "ft", {n: t.contiguous() for n, t in moved.items()})
    found = diagnose(run, save_model(tmp_path / "base", base), progress=False)
    (related,) = [finding for finding in found if finding.check == "Wt belongs to W0"]
    assert related.verdict == "wrong"
    assert "neighbouring pairs" in related.advice


@pytest.mark.parametrize("dora", [True, False])
def test_a_base_that_is_merged_already(dora: bool, tmp_path: Path) -> None:
    base = base_weights()
    adapter = adapter_weights(base)
    merged = {}
    for module in MODULES:
        name = f"base_model.model.{module}"
        A, B, m = (
            adapter[f"{name}.{part}"]
            for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
        v = base[f"{module}.weight"] + ALPHA / RANK * B @ A
        merged[f"{module}.weight"] = v / v.norm(dim=1, keepdim=True) * m[:, None] if dora else v
    found = doctor(tmp_path, adapter if dora else without_magnitudes(adapter), merged)
    assert found["merged once"].verdict == "wrong"
    assert found["merged once"].number.startswith(("W0 has +0.9", "W0 has +1.0"))


def test_another_base(tmp_path: Path) -> None:
    base = base_weights()
    run = save_model(tmp_path / "ft", base_weights(seed=4))
    found = diagnose(run, save_model(tmp_path / "base", base), progress=False)
    (related,) = [finding for finding in found if finding.check == "Wt belongs to W0"]
    assert (related.verdict, "not the base" in related.advice) == ("wrong", True)
    found_ = doctor(tmp_path, adapter_weights(base), base, base_model_name_or_path="org/other")
    named = found_["the base is the one it names"]
    assert (named.verdict, named.number) == ("suspicious", "other, not base")


def test_factors_that_were_never_trained(tmp_path: Path) -> None:
    base = base_weights()
    adapter = without_magnitudes(adapter_weights(base))
    still = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in adapter.items()}
    found = doctor(tmp_path, still, base)["weights moved"]
    assert (found.verdict, found.number) == ("wrong", "0 of 9 matrices differ from W0")
    some = still | {n: t for n, t in adapter.items() if "layers.1" not in n}
    found = doctor(tmp_path, some, base)["weights moved"]
    assert (found.verdict, found.number) == ("suspicious", "6 of 9 matrices differ from W0")


def test_numbers_that_are_none(tmp_path: Path) -> None:
    base = base_weights()
    adapter = adapter_weights(base)
    adapter[f"base_model.model.{MODULES[4]}.lora_A.weight"][1, 2] = torch.nan
    found = doctor(tmp_path, adapter, base)["numbers are finite"]
    assert (found.verdict, MODULES[4] in found.number) == ("wrong", True)


def test_an_update_as_small_as_rounding(tmp_path: Path) -> None:
    base = {name: t.bfloat16() for name, t in base_weights().items()}
    adapter = without_magnitudes(adapter_weights(base_weights(), size=2e-5))
    found = doctor(tmp_path, adapter, base)["rounding is small"]
    assert found.verdict == "suspicious"
    share = float(found.number.removeprefix("at most ").split("%")[0].replace(",", "")) / 100
    # What rounding Wt to bfloat16 really does.
    lost = []
    for module in MODULES:
        A, B = (adapter[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        wt = base[f"{module}.weight"].double() + ALPHA / RANK * B @ A
        lost.append(float((wt.bfloat16().double() - wt).norm() / (ALPHA / RANK * B @ A).norm()))
    assert share == pytest.approx(max(lost), rel=2e-3)


def test_how_much_rounding_took_of_a_whole_model_is_estimated(tmp_path: Path) -> None:
    exact = base_weights()
    g = torch.Generator().manual_seed(1)
    size = 3e-5  # hardly more than bfloat16's rounding of such weights
    moved = {n: (t + size * torch.randn(t.shape, generator=g)).bfloat16() for n, t in exact.items()}
    base = {n: t.bfloat16() for n, t in exact.items()}
    run = save_model(tmp_path / "ft", moved)
    found = diagnose(run, save_model(tmp_path / "base", base), progress=False)
    assert [f.verdict for f in found if f.check == "rounding is small"] == ["suspicious"]


def test_an_update_too_large_for_fine_tuning(tmp_path: Path) -> None:
    base = base_weights()
    found = doctor(tmp_path, without_magnitudes(adapter_weights(base)), base, lora_alpha=13)
    assert found["Wt belongs to W0"].verdict == "suspicious"
    assert "α" in found["Wt belongs to W0"].advice


def test_what_cannot_be_read_is_wrong(tmp_path: Path) -> None:
    base = base_weights()
    found = doctor(tmp_path, adapter_weights(base), base, lora_alpha=None)["can be read"]
    assert (found.verdict, "lora_alpha missing" in found.advice) == ("wrong", True)
    with pytest.raises(LocationError, match="give it with --base"):
        diagnose(save_adapter(tmp_path / "adapter", adapter_weights(base)), progress=False)
    with pytest.raises(LocationError, match="no such file"):
        diagnose(tmp_path / "nowhere", tmp_path / "base", progress=False)


def test_the_commands_exit_code_tells_scripts(tmp_path: Path) -> None:
    base, run = base_weights(), CliRunner()
    where = save_adapter(tmp_path / "adapter", adapter_weights(base))
    arguments = ["doctor", str(where), "--base", str(save_model(tmp_path / "base", base))]
    sound = run.invoke(app, arguments)
    assert (sound.exit_code, "wrong" in sound.output) == (0, False)
    save_model(tmp_path / "base", base_weights(seed=9))
    sick = run.invoke(app, [*arguments, "--json"])
    assert sick.exit_code == 1
    verdicts = {one["check"]: one["verdict"] for one in json.loads(sick.stdout)}
    assert verdicts["magnitudes fit W0"] == "wrong"
    assert "→" in run.invoke(app, arguments).output


def test_the_first_reading_of_a_file_is_whole(tmp_path: Path) -> None:
    base = base_weights()
    where = save_adapter(tmp_path / "adapter", adapter_weights(base))
    file = where / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (found,) = diagnose(where, save_model(tmp_path / "base", base), progress=False)
    assert (found.verdict, "truncated" in found.advice) == ("wrong", True)
    assert load_file(tmp_path / "base" / "model.safetensors")
