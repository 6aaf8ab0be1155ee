"""Adapters of image models: what no library writes into one file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from servers import Files, serving
from test_fixtures import tensors_in

import wda
from wda.checkpoints import Given, open_checkpoint
from wda.checkpoints.diffusion.parts import names_in_base
from wda.errors import CheckpointError, PairingError, WdaError

FIXTURES = Path(__file__).parent / "fixtures"
RANK, ALPHA = 3, 2.0


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 3


def write(file: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata)
    return file


def write_base(folder: Path, **weights: torch.Tensor) -> Path:
    """Write a model of one part, whose modules are called blocks.0.NAME."""
    named = {f"blocks.0.{name}.weight": weight for name, weight in weights.items()}
    write(folder / "diffusion_pytorch_model.safetensors", named)
    return folder


def factors(name: str, shape: tuple[int, ...], down: str, up: str) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{down}.weight": draw(RANK, *shape[1:], seed=1),
        f"{name}.{up}.weight": draw(shape[0], RANK, *[1 for _ in shape[2:]], seed=2),
    }


def product(tensors: dict[str, torch.Tensor], down: str, up: str) -> torch.Tensor:
    a = next(t for name, t in tensors.items() if f".{down}." in name).double()
    b = next(t for name, t in tensors.items() if f".{up}." in name).double()
    return b.reshape(len(b), -1) @ a.reshape(len(a), -1)


def check(table: object, w0: torch.Tensor, wt: torch.Tensor, per: str = "output") -> None:
    (row,) = table.itertuples()  # type: ignore[attr-defined]
    true = wda.decompose(w0.flatten(1), wt, per)  # type: ignore[arg-type]
    assert row.delta_m == pytest.approx(true.delta_m, rel=1e-6)
    assert row.delta_d == pytest.approx(true.delta_d, rel=1e-6)


@pytest.mark.parametrize("name", ["lycoris-3.1", "lycoris-4.1", "onetrainer"])
def test_each_form_is_the_same_along_the_other_axis(name: str) -> None:
    base, truth = FIXTURES / name / "base", load_file(FIXTURES / name / "truth.safetensors")
    table = wda.compare(
        FIXTURES / name / "checkpoint.safetensors",
        base=base,
        matrices=["re:."],
        per="input",
        cache=False,
        progress=False,
    ).table
    start = tensors_in(base)
    assert len(table) >= 12
    for row in table.itertuples():
        module = f"{row.module}.weight"
        true = wda.decompose(start[module].flatten(1), truth[module].flatten(1), "input")
        assert row.delta_m == pytest.approx(true.delta_m, rel=1e-6)
        assert row.delta_d == pytest.approx(true.delta_d, rel=1e-6)


# A convolution's magnitude of shape (1, n, 1, 1) is PEFT's per output or LyCORIS's per input.


def convolution(folder: Path, channels: int, count: int, **others: torch.Tensor) -> Path:
    tensors = factors("unet.blocks.0.conv1", (8, channels, 3, 3), "lora_A", "lora_B")
    magnitude = {"unet.blocks.0.conv1.lora_magnitude_vector": 1 + draw(1, count, 1, 1).abs()}
    return write(folder / "pytorch_lora_weights.safetensors", tensors | magnitude | others)


def converted(w0: torch.Tensor, file: Path, axis: str) -> torch.Tensor:
    tensors = load_file(file)
    v = w0.double().flatten(1) + product(tensors, "lora_A", "lora_B")
    m = tensors["unet.blocks.0.conv1.lora_magnitude_vector"].double().flatten()
    if axis == "output":
        return m[:, None] * v / v.norm(dim=1, keepdim=True)
    of_channels = v.view(8, len(m), -1)
    norm = of_channels.square().sum(dim=(0, 2)).sqrt()
    return ((m / norm)[None, :, None] * of_channels).flatten(1)


def measured(file: Path, base: Path, **given: object) -> object:
    return wda.compare(
        file,
        base=base,
        matrices=["re:."],
        given=Given(**given),  # type: ignore[arg-type]
        cache=False,
        progress=False,
    ).table


@pytest.mark.parametrize(("channels", "count", "axis"), [(6, 8, "output"), (6, 6, "input")])
def test_channels_tell_what_a_convolutions_magnitude_is_of(
    channels: int, count: int, axis: str, tmp_path: Path
) -> None:
    w0 = draw(8, channels, 3, 3, seed=5)
    base, file = write_base(tmp_path / "b", conv1=w0), convolution(tmp_path, channels, count)
    check(measured(file, base, alpha=3), w0, converted(w0, file, axis))


def test_the_magnitudes_of_linear_layers_tell_what_a_square_convolutions_are_of(
    tmp_path: Path,
) -> None:
    w0, linear = draw(8, 8, 3, 3, seed=5), draw(7, 5)
    base = write_base(tmp_path / "b", conv1=w0, to_q=linear)
    for shape, axis in (((1, 5), "input"), ((7,), "output"), ((7, 1), "output")):
        name = "unet.blocks.0.to_q"
        of_linear = factors(name, (7, 5), "lora_A", "lora_B")
        of_linear[f"{name}.lora_magnitude_vector"] = 1 + draw(*shape).abs()
        file = convolution(tmp_path / axis, 8, 8, **of_linear)
        table = measured(file, base, alpha=3)
        of_conv = table[table["matrix"] == "conv1"]  # type: ignore[index]
        conv = {n: t for n, t in load_file(file).items() if "conv1" in n}
        check(of_conv, w0, converted(w0, write(tmp_path / "c.safetensors", conv), axis))


@pytest.mark.parametrize("axis", ["output", "input"])
def test_where_nothing_tells_the_axis_the_user_does(axis: str, tmp_path: Path) -> None:
    w0 = draw(8, 8, 3, 3, seed=5)
    base, file = write_base(tmp_path / "b", conv1=w0), convolution(tmp_path, 8, 8)
    with pytest.raises(CheckpointError, match=r"does not tell; say it with --axis output \(PEFT"):
        measured(file, base, alpha=3)
    check(measured(file, base, alpha=3, axis=axis), w0, converted(w0, file, axis))


def test_metadata_tells_that_a_convolutions_magnitude_is_pefts(tmp_path: Path) -> None:
    w0 = draw(8, 8, 3, 3, seed=5)
    file = convolution(tmp_path, 8, 8)
    config = json.dumps({"unet.r": 3, "unet.lora_alpha": 3})
    write(file, load_file(file), lora_adapter_metadata=config)
    base = write_base(tmp_path / "b", conv1=w0)
    check(measured(file, base), w0, converted(w0, file, "output"))


# Scalings.


def test_a_file_without_alpha_asks_for_it(tmp_path: Path) -> None:
    w0 = draw(8, 6)
    base = write_base(tmp_path / "b", to_q=w0)
    tensors = factors("lora_unet_blocks_0_to_q", (8, 6), "lora_down", "lora_up")
    file = write(tmp_path / "old.safetensors", tensors)
    with pytest.raises(
        CheckpointError, match="stores no alpha for lora_unet_blocks_0_to_q.*--alpha"
    ):
        measured(file, base)
    wt = w0 + 5 / RANK * product(tensors, "lora_down", "lora_up")
    check(measured(file, base, alpha=5), w0, wt)
    stored = tensors | {"lora_unet_blocks_0_to_q.alpha": torch.tensor(ALPHA)}
    wt = w0 + ALPHA / RANK * product(tensors, "lora_down", "lora_up")
    check(measured(write(file, stored), base, alpha=5), w0, wt)


def test_matrices_of_a_kronecker_product_without_factors_have_no_rank_to_divide_by(
    tmp_path: Path,
) -> None:
    w0, w1, w2 = draw(8, 6), draw(2, 3), draw(4, 2, seed=1)
    name = "lycoris_blocks_0_to_q"
    tensors = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2, f"{name}.alpha": torch.tensor(9.0)}
    file = write(tmp_path / "x.safetensors", tensors)
    table = measured(file, write_base(tmp_path / "b", to_q=w0))
    assert set(table["method"]) == {"lokr"}  # type: ignore[index]
    check(table, w0, w0.double() + torch.kron(w1.double(), w2.double()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet.r": 4}, r"blocks.0.to_q has rank 3 and in lora_adapter_metadata 4"),
        ({"unet.init_lora_weights": "pissa"}, "'pissa', which changes the base weight"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    config = {"unet.r": 3, "unet.lora_alpha": 2, "unet.init_lora_weights": True} | change
    tensors = factors("unet.blocks.0.to_q", (8, 6), "lora_A", "lora_B")
    file = write(tmp_path / "x.safetensors", tensors, lora_adapter_metadata=json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(file)


def test_ai_toolkit_scales_its_dora_in_one_of_two_places(tmp_path: Path) -> None:
    name = "lora_unet_blocks_0_to_q"
    tensors = factors(name, (8, 6), "lora_down", "lora_up") | {f"{name}.magnitude": torch.ones(8)}
    file = write(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match="--alpha"):
        open_checkpoint(file)
    with pytest.raises(CheckpointError, match="no weight decomposition"):
        open_checkpoint(file, Given(alpha=6))
    assert open_checkpoint(file, Given(alpha=3)).method == "dora"


def test_ai_toolkits_lora_with_peft_names_has_alpha_as_its_rank(tmp_path: Path) -> None:
    tensors = factors("diffusion_model.blocks.0.to_q", (8, 6), "lora_A", "lora_B")
    software = json.dumps({"name": "ai-toolkit", "version": "0.7"})
    file, w0 = write(tmp_path / "x.safetensors", tensors, software=software), draw(8, 6)
    table = measured(file, write_base(tmp_path / "b", to_q=w0))
    check(table, w0, w0 + product(tensors, "lora_A", "lora_B"))


# What is refused.


def test_means_instead_of_lengths_are_refused(tmp_path: Path) -> None:
    name, w0 = "lora_unet_blocks_0_to_q", draw(8, 6)
    tensors = factors(name, (8, 6), "lora_down", "lora_up")
    tensors |= {f"{name}.dora_scale": w0.mean(dim=0, keepdim=True)}
    tensors |= {f"{name}.alpha": torch.tensor(2.0)}
    file = write(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match="LyCORIS 2 stored means"):
        measured(file, write_base(tmp_path / "b", to_q=w0))


@pytest.mark.parametrize(
    ("endings", "message"),
    [
        (("a1.weight", "a2.weight", "b1.weight", "b2.weight"), "GLoRA is not read; merge it"),
        (("oft_blocks", "alpha"), "OFT is not read; merge it"),
        (("lambda_layer", "q_layer.weight", "p_layer.weight"), "T-LoRA is not read"),
        (("lora_down.weight",), "only one of the two exists for lora_unet_x"),
        (("hada_w1_a", "hada_w1_b", "alpha"), "hada_w2_a is missing for lora_unet_x"),
        (("lokr_w1", "lokr_w2_a", "alpha"), "lokr_w2_b is missing for lora_unet_x"),
        (("lora_mid.weight", "lora_up.weight", "alpha"), "A is missing for lora_unet_x"),
        (("dora_scale", "w_norm"), "magnitudes but no direction for lora_unet_x"),
    ],
)
def test_what_is_incomplete_or_not_read_is_refused(
    endings: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    tensors = {f"lora_unet_x.{ending}": draw(3, 3) for ending in endings}
    if "alpha" in endings:
        tensors["lora_unet_x.alpha"] = torch.tensor(1.0)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write(tmp_path / "x.safetensors", tensors), Given(alpha=3))


def test_norms_and_biases_are_named_as_not_read(tmp_path: Path) -> None:
    tensors = factors("unet.a", (8, 6), "lora_A", "lora_B")
    others = {"unet.b.diff": draw(6), "unet.a.diff_b": draw(8), "unet.n.w_norm": draw(8)}
    file = write(tmp_path / "x.safetensors", tensors | others | {"unet.k.weight": draw(4, 4)})
    checkpoint = open_checkpoint(file, Given(alpha=3))
    assert set(checkpoint.unread) == {*others, "unet.k.weight"}
    assert checkpoint.modules == {"unet.a"}


# Names.

LAYER = "text_model.encoder.layers.0.mlp.fc1"
FLAT = "text_model_encoder_layers_0_mlp_fc1"
PIPELINE = [f"text_encoder.{LAYER}", f"text_encoder_2.{LAYER}", "unet.down_blocks.0.to_q"]
ONE_FILE = [
    f"conditioner.embedders.0.transformer.{LAYER}",
    "model.diffusion_model.input_blocks.4.1.to_q",
]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (f"lora_te1_{FLAT}", PIPELINE, f"text_encoder.{LAYER}"),
        (f"lora_te_{FLAT}", PIPELINE, f"text_encoder.{LAYER}"),
        (f"lora_te2_{FLAT}", PIPELINE, f"text_encoder_2.{LAYER}"),
        (f"text_encoder_2.{LAYER}", PIPELINE, f"text_encoder_2.{LAYER}"),
        (f"lora_te1_{FLAT}", ONE_FILE, ONE_FILE[0]),
        ("lora_unet_input_blocks_4_1_to_q", ONE_FILE, ONE_FILE[1]),
        ("diffusion_model.input_blocks.4.1.to_q", ONE_FILE, ONE_FILE[1]),
        ("lora_unet_down_blocks_0_to_q", ["down_blocks.0.to_q"], "down_blocks.0.to_q"),
        ("lycoris_down_blocks_0_to_q", PIPELINE, "unet.down_blocks.0.to_q"),
        (f"lora_te1_{FLAT}", ["encoder.layers.0.mlp.fc1"], "encoder.layers.0.mlp.fc1"),
        ("text_encoder.encoder.layers.0.mlp.fc1", PIPELINE, f"text_encoder.{LAYER}"),
        ("lora_unet_a_b_c", ["a_b.c"], "a_b.c"),
        ("unet.x.attn1.processor.to_out", ["unet.x.attn1.to_out.0"], "unet.x.attn1.to_out.0"),
    ],
)
def test_the_bases_own_names_tell_where_the_dots_were(
    ours: str, theirs: list[str], expected: str
) -> None:
    assert names_in_base([ours], theirs) == {ours: expected}


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (["lora_unet_input_blocks_4_1_to_q"], PIPELINE, "authors do.*give the authors' one file"),
        (["lora_unet_down_blocks_0_to_q"], ONE_FILE, "give the pipeline's folder"),
        (["lora_unet_x"], PIPELINE, "is this the model it was trained on"),
        (["lora_unet_a_b_c"], ["a_b.c", "a.b_c"], "is this the model it was trained on"),
        ([f"lora_te1_{FLAT}", f"lora_te2_{FLAT}"], [LAYER], "the folder of the whole pipeline"),
    ],
)
def test_names_that_do_not_fit_are_explained(
    ours: list[str], theirs: list[str], message: str
) -> None:
    with pytest.raises(PairingError, match=message):
        names_in_base(ours, theirs)


def test_a_part_that_the_base_lacks_is_an_error() -> None:
    with pytest.raises(WdaError, match="lora_te_text_model.*which the base does not have"):
        measured(FIXTURES / "kohya" / "checkpoint.safetensors", FIXTURES / "kohya/base/unet")


# Pipelines.


def test_a_pipeline_trained_whole_is_compared_part_by_part(tmp_path: Path) -> None:
    weights = {"to_q.weight": draw(8, 6), "to_q.bias": draw(8)}
    for folder, size in (("base", 0.0), ("tuned", 0.1)):
        index = {"unet": ["d", "U"], "text_encoder": ["t", "C"], "vae": [None, None], "_v": "1"}
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model_index.json").write_text(json.dumps(index))
        moved = {name: t + size * draw(*t.shape, seed=9) for name, t in weights.items()}
        write(tmp_path / folder / "unet" / "diffusion_pytorch_model.safetensors", moved)
        write(tmp_path / folder / "text_encoder" / "model.safetensors", moved)
    write(tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors", weights)  # left over
    table = measured(tmp_path / "tuned", tmp_path / "base")
    assert sorted(table["module"]) == ["text_encoder.to_q", "unet.to_q"]  # type: ignore[index]
    assert table["delta_m"].nunique() == 1  # type: ignore[index]
    for folder in ("unet", "text_encoder"):
        next((tmp_path / "tuned" / folder).iterdir()).unlink()
    with pytest.raises(CheckpointError, match="no folder named in model_index.json has weights"):
        open_checkpoint(tmp_path / "tuned")


def test_it_may_all_lie_on_a_server() -> None:
    fixture = FIXTURES / "kohya"
    here = measured(fixture / "checkpoint.safetensors", fixture / "base")
    with serving(Files, fixture) as (_, address):
        there = wda.compare(
            f"{address}/checkpoint.safetensors",
            base=f"{address}/base",
            matrices=["re:."],
            cache=False,
            progress=False,
        ).table
    assert there["delta_m"].tolist() == here["delta_m"].tolist()  # type: ignore[index]


def test_files_of_steps_are_steps(tmp_path: Path) -> None:
    base = write_base(tmp_path / "b", to_q=draw(8, 6))
    tensors = factors("lora_unet_blocks_0_to_q", (8, 6), "lora_down", "lora_up")
    for name in ("x-step00000500", "x-step00001000", "x"):
        write(tmp_path / "run" / f"{name}.safetensors", tensors)
    table = measured(tmp_path / "run", base, alpha=3)
    assert table["step"].tolist() == [500, 1000]  # type: ignore[index]
    for name in ("y_000000250", "y"):
        write(tmp_path / "toolkit" / f"{name}.safetensors", tensors)
    table = measured(tmp_path / "toolkit", base, alpha=3)
    assert table["step"].tolist() == [250]  # type: ignore[index]


# Other spellings of the same factors.


@pytest.mark.parametrize(
    ("name", "down", "up"),
    [
        ("unet.blocks.0.to_q", "lora_down", "lora_up"),  # OneTrainer's own
        ("diffusion_model.blocks.0.to_q", "lora_A", "lora_B"),  # ComfyUI's, by OneTrainer
        ("blocks.0.to_q", "lora_A", "lora_B"),  # the model's own names
        ("lora_prior_unet_blocks_0_to_q", "lora_down", "lora_up"),
    ],
)
def test_onetrainers_other_files_have_a_scale_per_input_too(
    name: str, down: str, up: str, tmp_path: Path
) -> None:
    w0 = draw(8, 6)
    scale = w0.norm(dim=0, keepdim=True) * (1 + 0.1 * draw(1, 6, seed=4))
    tensors = factors(name, (8, 6), down, up)
    more = {f"{name}.alpha": torch.tensor(ALPHA), f"{name}.dora_scale": scale}
    file = write(tmp_path / "x.safetensors", tensors | more)
    v = w0.double() + ALPHA / RANK * product(tensors, down, up)
    wt = scale.double() * v / v.norm(dim=0, keepdim=True)
    check(measured(file, write_base(tmp_path / "b", to_q=w0)), w0, wt)
