"""Prefix tuning (arXiv 2101.00190), by PEFT: keys and values before those of every text.

They are no part of any layer, so PEFT puts the whole model into another that passes them on. No
weight of the model changes, so there is nothing to merge and nothing to compare.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from wda.adapters.config import AdapterConfig
from wda.adapters.packed import hush_bitsandbytes
from wda.errors import MissingExtraError, ModelError


def with_prefix(
    model: nn.Module, config: AdapterConfig, task_type: str, trained_whole: tuple[str, ...] = ()
) -> nn.Module:
    """Give a model with trained keys and values before every text, and freeze the rest.

    They start at random, so that the model does not start as it was.

    Parameters
    ----------
    model : nn.Module
        A pre-trained model of transformers; it is frozen, and part of what is given.
    config : AdapterConfig
        How many virtual tokens.
    task_type : str
        PEFT's name of the task: ``"CAUSAL_LM"``, ``"SEQ_CLS"`` or ``"SEQ_2_SEQ_LM"``.
    trained_whole : tuple of str
        Names of modules that stay trainable as they are, such as a new classifier.

    Returns
    -------
    nn.Module
        A ``peft.PeftModel``, which :func:`save_adapter` and :func:`load_adapter` take.

    Raises
    ------
    MissingExtraError
        When PEFT is not installed.
    ModelError
        When PEFT cannot put a prefix before this model's texts, or it would leave no place for one.
    """
    peft = _peft()
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if most is not None and most <= config.virtual_tokens:
        raise ModelError(
            f"virtual_tokens: {config.virtual_tokens} leave no place for a text, for the model "
            f"has {most} positions; choose fewer"
        )
    # PEFT trains these itself where texts are classified.
    others = [module for module in trained_whole if module not in ("classifier", "score")]
    wanted = peft.PrefixTuningConfig(task_type=task_type, num_virtual_tokens=config.virtual_tokens)
    if others:
        wanted.modules_to_save = others
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers for what is called otherwise by now.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped: nn.Module = peft.get_peft_model(model, wanted)
    except ValueError as error:
        raise ModelError(
            f"model: peft cannot put a prefix before the texts of a {type(model).__name__}: "
            f"{str(error).splitlines()[0]}; choose another method"
        ) from None
    return wrapped


def has_prefix(model: Any) -> bool:
    """Tell whether :func:`with_prefix` made a model."""
    of_peft = type(model).__module__.startswith("peft.")  # importing peft takes seconds
    config = getattr(model, "active_peft_config", None) if of_peft else None
    return config is not None and config.peft_type == "PREFIX_TUNING"


def prefix_described(model: Any, base: str) -> dict[str, object]:
    """Give what PEFT's configuration says, with the location of the pre-trained model."""
    said = {"base_model_name_or_path": base, "inference_mode": True}
    return {**model.active_peft_config.to_dict(), **said}


def prefix_tensors(model: Any) -> dict[str, Tensor]:
    """Give what PEFT writes: the prefix of all layers, and what was trained whole."""
    tensors: dict[str, Tensor] = _peft().get_peft_model_state_dict(
        model, save_embedding_layers=False
    )
    return tensors


def load_prefix(model: Any, stored: dict[str, Tensor]) -> None:
    """Take the tensors of another training, of the same names and shapes."""
    _peft().set_peft_model_state_dict(model, stored)


def _peft() -> Any:
    hush_bitsandbytes()
    try:
        import peft  # noqa: PLC0415 - an extra
    except ImportError:
        raise MissingExtraError(
            "method: prefix needs peft, which is not installed; "
            "try: pip install 'weight-decomposition-analysis[peft]'"
        ) from None
    return peft
