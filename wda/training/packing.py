"""The base of QLoRA and QDoRA: packed once, kept beside the run, and trained on."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
import transformers

from wda.errors import MissingExtraError
from wda.files import staged_folder
from wda.training.recipe import Recipe
from wda.training.tasks import task_of
from wda.training.tasks.task import load_pretrained

BASE_FOLDER = "base"


def packed_base(recipe: Recipe, base: Path, run_folder: Path) -> Path:
    """Pack a base by bitsandbytes, unless the run's folder has it already.

    The analysis needs it: what packing changed is no part of what training changed, so W0 of an
    adapter on a packed base is what the packed numbers stand for.

    Parameters
    ----------
    recipe : Recipe
        Says how to pack.
    base, run_folder : Path
        The model, and where the packed one goes.

    Returns
    -------
    Path
        The folder of the packed model and its tokenizer.

    Raises
    ------
    MissingExtraError
        When bitsandbytes is not installed.
    """
    folder = run_folder / BASE_FOLDER
    if folder.is_dir():
        return folder
    tokenizer = load_pretrained(transformers.AutoTokenizer, base)
    options = {"quantization_config": _config(recipe), "device_map": _device_map()}
    model = task_of(recipe).model(base, [], **options)
    with staged_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    del model
    gc.collect()
    return folder


def _config(recipe: Recipe) -> transformers.BitsAndBytesConfig:
    try:
        import bitsandbytes  # noqa: F401, PLC0415 - an extra
    except ImportError:
        raise MissingExtraError(
            "quantised: needs bitsandbytes, which is not installed; "
            "try: pip install 'weight-decomposition-analysis[quantised]'"
        ) from None
    if recipe.quantised == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    compute = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(recipe.precision)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute or torch.float32,
    )


def _device_map() -> dict[str, Any]:
    return {"": torch.accelerator.current_accelerator() or "cpu"}
