"""Packed weights mean what their own libraries read in them, and what is not known is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_model
from safetensors.torch import load_file, save_file

import wda
from wda.checkpoints import open_base, open_checkpoint
from wda.errors import CheckpointError, PairingError

FIXTURES = Path(__file__).parent / "fixtures"
SCHEMES = {
    "nf4_double": "nf4",
    "fp4": "fp4",
    "int8": "int8",
    "gptq": "gptq",
    "awq": "awq",
    "fp8_blocks": "fp8",
    "packed_int4": "packed",
    "mlx_4bit": "mlx",
}
DOWN = "model.layers.0.mlp.down_proj"


def changed(
    fixture: str,
    folder: Path,
    tensors: Callable[[dict[str, torch.Tensor]], object] = lambda _: None,
    **config: object,
) -> Path:
    """Copy a fixture's checkpoint with other tensors or another configuration."""
    copy = folder / fixture
    shutil.copytree(FIXTURES / fixture / "checkpoint", copy)
    held = load_file(copy / "model.safetensors")
    tensors(held)
    save_file(held, copy / "model.safetensors")
    settings = json.loads((copy / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps(settings))
    return copy


@pytest.mark.parametrize("fixture", SCHEMES)
def test_values_are_those_of_the_library(fixture: str) -> None:
    checkpoint = open_base(FIXTURES / fixture / "checkpoint")
    assert checkpoint.quantised == SCHEMES[fixture]
    truth = load_file(FIXTURES / fixture / "truth.safetensors")
    packed = [name for name in truth if "_proj" in name]
    assert len(packed) == 7
    for name in packed:
        entry, wanted = checkpoint.tensors[name], truth[name].float()
        assert entry.shape == tuple(wanted.shape)
        assert entry.stored.split()[0] == SCHEMES[fixture]
        torch.testing.assert_close(checkpoint.tensors.read(name), wanted, rtol=2e-7, atol=0)


@pytest.mark.parametrize("per", ["output", "input"])
@pytest.mark.parametrize("fixture", ["nf4_double", "fp4", "int8", "fp8_blocks", "mlx_4bit"])
def test_the_floor_of_packed_weights_is_what_packing_them_shows(fixture: str, per: str) -> None:
    """Those whose fixture holds the weights that were packed."""
    folder = FIXTURES / fixture
    packed, plain = folder / "checkpoint", folder / "base"
    there, back = (
        wda.compare(
            one,
            base=other,
            per=per,
            matrices=["query", "down", "up"],
            progress=False,  # type: ignore[arg-type]
        ).table
        for one, other in ((packed, plain), (plain, packed))
    )
    for table in (there, back):
        assert table["below_floor"].all()
        assert 0.6 < table["delta_m"].mean() / table["floor_delta_m"].mean() < 1.3
        assert 0.85 < table["delta_d"].mean() / table["floor_delta_d"].mean() < 1.15


@pytest.mark.parametrize("fixture", SCHEMES)
def test_rows_are_rows_of_the_whole(fixture: str) -> None:
    tensors = open_base(FIXTURES / fixture / "checkpoint").tensors
    for name in (f"{DOWN}.weight", "model.layers.0.self_attn.q_proj.weight"):
        whole = tensors.read(name)
        for rows in (slice(0, 1), slice(3, 8), slice(17, 31), slice(31, None)):
            assert torch.equal(tensors.read(name, rows=[rows]), whole[rows])
        some = [slice(2, 5), slice(9, 16)]
        assert torch.equal(tensors.read(name, rows=some), torch.cat([whole[2:5], whole[9:16]]))


def test_the_second_form_of_gptq_stores_zero_points_as_they_are(tmp_path: Path) -> None:
    def add_one(tensors: dict[str, torch.Tensor]) -> None:
        for name, packed in tensors.items():
            if name.endswith(".qzeros"):
                packed.add_(0x11111111)  # each of eight numbers of four bits, none of which is 15

    config = {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}
    second = changed("gptq", tmp_path, add_one, quantization_config=config)
    name = f"{DOWN}.weight"
    first = open_base(FIXTURES / "gptq" / "checkpoint")
    assert torch.equal(open_base(second).tensors.read(name), first.tensors.read(name))


def test_an_adapter_is_measured_on_the_dequantised_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    # The same weights unpacked, which peft can merge without bitsandbytes.
    plain = tmp_path / "plain"
    shutil.copytree(FIXTURES / "nf4_double" / "base", plain)
    truth = load_file(FIXTURES / "nf4_double" / "truth.safetensors")
    save_file(truth, plain / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    tables = [
        wda.compare(tmp_path / "adapter", base=base, matrices=["query", "down"], progress=False)
        for base in (plain, FIXTURES / "nf4_double" / "checkpoint")
    ]
    expected, measured = (result.table for result in tables)
    assert len(measured) == 2
    for column in ("delta_m", "delta_d"):
        assert list(measured[column]) == pytest.approx(list(expected[column]), rel=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_awq_is_not_compared_with_what_it_was_made_from(turned: bool) -> None:
    pair = [FIXTURES / "awq" / "base", FIXTURES / "awq" / "checkpoint"]
    base, checkpoint = reversed(pair) if turned else pair
    with pytest.raises(PairingError, match=r"awq/checkpoint: AWQ moved scales from one layer's"):
        wda.compare(checkpoint, base=base, progress=False)


def test_awq_is_compared_with_awq() -> None:
    awq = FIXTURES / "awq" / "checkpoint"
    table = wda.compare(awq, base=awq, progress=False).table
    assert len(table) > 0
    assert (table.delta_m == 0).all()


@pytest.mark.parametrize(
    ("fixture", "setting", "needed"),
    [
        ("fp8_blocks", "quantization_config", "weight_block_size"),
        ("mlx_4bit", "quantization", "bits"),
        ("gptq", "quantization_config", "quant_method"),
    ],
)
def test_what_shapes_do_not_tell_has_to_be_told(
    fixture: str, setting: str, needed: str, tmp_path: Path
) -> None:
    copy = changed(fixture, tmp_path, **{setting: {}})
    with pytest.raises(CheckpointError, match=rf"{needed} in the quantization of config.json"):
        wda.compare(copy, base=FIXTURES / fixture / "base", progress=False)


def test_modules_of_mlx_may_have_settings_of_their_own(tmp_path: Path) -> None:
    own = {"group_size": 64, "bits": 8, DOWN: {"group_size": 32, "bits": 4}}
    copy = changed("mlx_4bit", tmp_path, quantization=own)
    plain = open_base(FIXTURES / "mlx_4bit" / "checkpoint")
    tensors = open_base(copy).tensors
    assert torch.equal(tensors.read(f"{DOWN}.weight"), plain.tensors.read(f"{DOWN}.weight"))
    with pytest.raises(CheckpointError, match="does not fit 8 bits in groups of 64"):
        tensors.read("model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5]), torch.rand(32, 1)])
def test_scales_of_8_bit_weights(scale: torch.Tensor, tmp_path: Path) -> None:
    stored = torch.randn(32, 8).to(torch.float8_e4m3fn)
    tensors = {"layer.0.query.weight": stored, "layer.0.query.weight_scale": scale}
    read = open_base(save_model(tmp_path / "model", tensors)).tensors.read("layer.0.query.weight")
    assert torch.equal(read, stored.float() * scale)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("gate_up_proj_blocks", "MXFP4"),
        ("W_q", "HQQ"),
        ("codebooks", "AQLM"),
        ("weight_scales", "EETQ"),
    ],
)
def test_other_schemes_are_named(part: str, name: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", {f"layer.0.query.{part}": torch.randn(4, 6)})
    with pytest.raises(CheckpointError, match=f"packed by {name}, which are not read; write the"):
        open_checkpoint(folder)


@pytest.mark.parametrize("save", ["safetensors", "pickle"])
def test_integers_are_no_weights(save: str, tmp_path: Path) -> None:
    packed = {"layer.0.query.weight": torch.ones(4, 6, dtype=torch.int8)}
    floats = {name: tensor.float() for name, tensor in packed.items()}
    plain = save_model(tmp_path / "plain", floats)
    folder = save_model(tmp_path / "packed", packed)
    if save == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save(packed, folder / "pytorch_model.bin")
    for base, checkpoint in ((plain, folder), (folder, plain)):
        with pytest.raises(CheckpointError, match=r"packed: the weight of layer.0.query is stored"):
            wda.compare(checkpoint, base=base, matrices=["query"], progress=False)
