"""Initialisers that change the base weight: what a training started from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from wda.checkpoints.factors import sort_names
from wda.checkpoints.forms import Factors, Stored
from wda.checkpoints.found import CONFIG_FILE, Found
from wda.checkpoints.full import FullCheckpoint
from wda.checkpoints.rebased import (
    Start,
    StoredStart,
    WithoutInitial,
    WithoutLeading,
    olora,
    pissa,
)
from wda.errors import CheckpointError
from wda.locations import locate
from wda.naming import align

# Initialisers that leave W0 as it is.
HARMLESS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

# Those whose part of W0 can be computed from it alone.
_COMPUTABLE = {"pissa": pissa, "olora": olora}

# Those that take s·B0·A0 off W0, where A0 and B0 depend on data or on chance.
_SUBTRACTING = re.compile(r"pissa_niter_\d+|corda|lora_ga")

_FACTORS = {
    "A": re.compile(r"\.lora_A(\.[^.]+)?\.weight$"),
    "B": re.compile(r"\.lora_B(\.[^.]+)?\.weight$"),
}

# Gives the start of a module, of a rank and a scaling.
StartOf = Callable[[str, int, float], Start]


def start_of(found: Found, modules: Iterable[str]) -> StartOf | None:
    """Tell what modules were trained from; None where that is W0.

    Raises
    ------
    CheckpointError
        When that cannot be known without the adapter as it was before its training.
    """
    said = found.config.get("init_lora_weights")
    initialiser = said.lower() if isinstance(said, str) else said
    if initialiser in HARMLESS:
        return None
    if found.given.initial is not None:
        return _given(found, str(initialiser), list(modules))
    if initialiser in _COMPUTABLE:
        split = _COMPUTABLE[initialiser]
        return lambda _module, rank, scaling: WithoutLeading(split, rank, scaling)
    if not _SUBTRACTING.fullmatch(initialiser) and initialiser != "loftq":
        raise CheckpointError(
            f"{found.folder / CONFIG_FILE}: init_lora_weights {said!r} is not known, and it may "
            "change the base weight before training; merge the adapter with peft and compare the "
            "merged model"
        )
    wanted = "the base that it left" if initialiser == "loftq" else "the adapter before training"
    raise CheckpointError(
        f"{found.folder / CONFIG_FILE}: init_lora_weights {said!r} changes the base weight in a "
        f"way that cannot be computed again; give the location of {wanted} with --initial "
        "(initial in a manifest), or convert the adapter with peft's "
        "path_initial_model_for_weight_conversion and compare that"
    )


def _given(found: Found, initialiser: str, modules: list[str]) -> StartOf:
    """Read the start off what the user names: the adapter before its training, or its base."""
    before = Found(locate(str(found.given.initial)))
    if not before.config:
        model = FullCheckpoint.open(before)
        if model is None:
            raise CheckpointError(f"{before.path}: is neither an adapter nor a whole model")
        rename = align(modules, model.modules)
        return lambda module, _rank, _scaling: StoredStart(
            Stored(model.tensors, f"{rename(module)}.weight")
        )
    if initialiser == "loftq":
        raise CheckpointError(
            f"{before.path}: is an adapter; loftq leaves a quantised base that its factors do not "
            "tell; give the location of that base with --initial"
        )
    names = sort_names(before.path, before.tensors, _FACTORS)

    def start(module: str, rank: int, scaling: float) -> Start:
        if module not in names["A"] or names.rank(module) != rank:
            raise CheckpointError(
                f"{before.path}: has no factors of rank {rank} for {module}; --initial needs this "
                "very adapter as it was before its training"
            )
        return WithoutInitial(
            Factors(names.stored("A", module), names.stored("B", module), scaling)
        )

    return start
