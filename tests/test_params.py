"""Counting without weights: the paper's column, PEFT's own counts, and real trainings'."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapted import tiny_llama
from conftest import wda_command
from test_training import recipe as small_recipe
from torch import nn

from wda.errors import LocationError, ManifestError, SelectionError
from wda.sweeps import load_runs
from wda.training import Recipe, load_recipe, train_recipe
from wda.training.blueprint import blueprint, count, model_config
from wda.training.trained_whole import modules_called

ROOT = Path(__file__).parent.parent
PAGE = runpy.run_path(str(ROOT / "docs/make_paper.py"))
FILES = sorted((ROOT / "wda/recipes/paper").glob("*.yaml"))


def as_printed(share: float, printed: str) -> bool:
    """Tell whether a number, rounded or cut off, is the one printed."""
    if "." not in printed:
        return share == float(printed)
    digits = len(printed.partition(".")[2])
    cut = math.floor(share * 10**digits) / 10**digits
    return printed in (f"{share:.{digits}f}", f"{cut:.{digits}f}")


@pytest.mark.parametrize("name", PAGE["PRINTED"])
def test_shares_are_those_the_paper_prints(name: str) -> None:
    (run,) = load_runs(ROOT / f"wda/recipes/paper/{name}.yaml")
    share = 100 * count(blueprint(run.recipe)).share
    assert as_printed(share, PAGE["PRINTED"][name]) == (name not in PAGE["DIFFERENT"])


def test_every_recipe_counts_and_the_page_is_theirs() -> None:
    assert {*PAGE["PRINTED"]} < {file.stem for file in FILES}
    assert (ROOT / "docs/paper.md").read_text() == PAGE["render"]()


@pytest.mark.parametrize(
    ("method", "theirs"),
    [
        ("lora", lambda: peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"])),
        ("dora", lambda: peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], use_dora=True)),
        ("vera", lambda: peft.VeraConfig(r=3, target_modules=["q_proj", "o_proj"])),
        ("prefix", lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    ],
)
def test_counts_are_pefts(method: str, theirs: Any, tmp_path: Path) -> None:
    model = tiny_llama(num_key_value_heads=4)
    model.config.save_pretrained(tmp_path)
    adapter: dict[str, Any] = {"method": method}
    if method == "prefix":
        adapter["virtual_tokens"] = 5
    else:
        targets = ["q_proj", "o_proj"] if method == "vera" else ["q_proj", "v_proj"]
        adapter |= {"rank": 3, "targets": targets}
    counted = count(blueprint(of_model(tmp_path, adapter=adapter)))
    with_peft = peft.get_peft_model(model, theirs())
    trainable, parameters = with_peft.get_nb_trainable_parameters()
    assert (counted.trainable, counted.parameters) == (trainable, parameters)


def of_model(base: Path | str, **changes: Any) -> Recipe:
    content = {
        "base": str(base),
        "task": "causal-lm",
        "data": {"location": "none.csv", "prompt": "{a}", "answer": "{b}"},
        "steps": 3,
        **changes,
    }
    return Recipe.model_validate(content)


@pytest.mark.parametrize("method", ["ft", "lora", "dora", "magnitude", "dvora"])
def test_counts_are_those_of_a_training(method: str, trainable: Path, tmp_path: Path) -> None:
    adapter = None if method == "ft" else {"method": method}
    if method in ("lora", "dora", "dvora"):
        adapter = {"method": method, "rank": 2}
    asked = small_recipe(trainable, steps=2, keep=[], adapter=adapter)
    result = train_recipe(asked, tmp_path / "run", progress=False)
    counted = count(blueprint(asked))
    assert (counted.trainable, counted.parameters) == (result.trainable, result.parameters)


def test_modules_trained_whole_are_counted_trained_and_kept(
    trainable: Path, tmp_path: Path
) -> None:
    changes = {"trained_whole": ["pooler", "layer.1.output.LayerNorm"]}
    plain, asked = small_recipe(trainable), small_recipe(trainable, **changes)
    more = count(blueprint(asked)).trainable - count(blueprint(plain)).trainable
    assert more == 24 * 24 + 24 + 24 + 24
    train_recipe(asked, tmp_path / "run", progress=False)
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "run/checkpoint-12/adapter_model.safetensors")
    started = transformers.AutoModel.from_pretrained(trainable / "base").state_dict()
    for name in ("pooler.dense.weight", "encoder.layer.1.output.LayerNorm.bias"):
        (stored,) = [tensor for key, tensor in kept.items() if key.endswith(name)]
        assert not torch.equal(stored, started[name])
    two = nn.ModuleDict({"a": nn.ModuleDict({"norm": nn.Linear(1, 1)}), "prenorm": nn.Linear(1, 1)})
    assert modules_called(two, ["norm"]) == ("a.norm",)
    wrong = small_recipe(trainable, trained_whole=["poler"])
    with pytest.raises(SelectionError, match=r"trained_whole: no module is called 'poler'; did"):
        blueprint(wrong)
    with pytest.raises(ValueError, match="trained_whole: without an adapter all modules"):
        small_recipe(trainable, "ft", trained_whole=["pooler"])


def test_what_cannot_be_counted_says_so(tmp_path: Path) -> None:
    with pytest.raises(LocationError, match=r"has no config\.json of a model that transformers"):
        model_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(LocationError, match=r"has no config\.json of a model that transformers"):
        model_config(str(tmp_path))
    tiny_llama().config.save_pretrained(tmp_path)
    with pytest.raises(ManifestError, match=r"task: seq2seq: .* is a llama, of which transformers"):
        blueprint(of_model(tmp_path, task="seq2seq"))


def test_models_of_images_are_counted_and_not_trained(tmp_path: Path) -> None:
    asked = load_recipe(ROOT / "wda/recipes/paper/vl-bart-image-lora.yaml")
    with pytest.raises(ManifestError, match="task: image-text models are counted by wda params"):
        train_recipe(asked, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_of_a_diffusion_model_the_unet_is_counted() -> None:
    """Of Stable Diffusion XL's 2,567,463,684 parameters none is trained but the adapter's."""
    recipe = load_recipe(ROOT / "wda/recipes/paper/sdxl-dreambooth-lora.yaml")
    counted = count(blueprint(recipe))
    assert counted.parameters - counted.trainable == 2_567_463_684
    assert counted.trainable == 5_806_080  # of rank 4, as the example of diffusers has it


def test_the_command_prints_counts(tmp_path: Path) -> None:
    recipes = [FILES[0], "pkg://wda/recipes/paper/granularity-llama-7b.yaml"]
    done = wda_command("params", *recipes, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = json.loads(done.stdout)
    assert (first["recipe"], first["method"]) == (FILES[0].stem, "dora")
    assert second["trainable"] == 26_525_696
    assert second["share"] == second["trainable"] / second["parameters"]
    shown = wda_command("params", FILES[0], cwd=tmp_path).stdout
    assert "161,267,712  6,899,683,328  2.3373%" in shown
