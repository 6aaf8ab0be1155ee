"""The methods of peft beside LoRA, each with the tensors and the scaling it has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from wda.checkpoints.factors import Names, sort_names
from wda.checkpoints.forms import Axis, Decomposed, Form, Nothing, Stored, Whole
from wda.checkpoints.found import CONFIG_FILE, Found
from wda.checkpoints.peft.contents import WHOLE, Contents, require
from wda.checkpoints.peft.versions import rank_and_alpha, written_by
from wda.checkpoints.products import Hadamard, Kronecker, Product
from wda.checkpoints.rotations import Cayley, Rotated, Scaled
from wda.checkpoints.vectors import (
    DrawnProjections,
    Projections,
    SharedFactors,
    SingularFactors,
    StoredProjections,
)
from wda.errors import CheckpointError, listing

# With this release the last term of OFT's series lost its factor 2; from it on, configurations
# name the release that wrote them.
_SERIES_CHANGED = 18


def read_adalora(found: Found) -> Contents:
    """Read AdaLoRA: s = α / rank, with the rank before pruning."""
    config = require(found, "init_r", "lora_alpha")
    names = _sorted(found, "lora_A", "lora_B", "lora_E", frozen=r"|\.ranknum(\.[^.]+)?$")
    initial = float(config["init_r"])
    alpha = config["lora_alpha"] if config["lora_alpha"] > 0 else initial
    forms: dict[str, Form] = {
        module: SingularFactors(
            _stored(names, "lora_A", module),
            _stored(names, "lora_B", module),
            alpha / (initial + 1e-5),  # the library's guard against pruning to rank 0
            _stored(names, "lora_E", module),
        )
        for module in names["lora_A"]
    }
    return _contents(names, forms, "adalora")


def read_vera(found: Found) -> Contents:
    """Read VeRA: vectors of each module on projections that all share.

    DVoRA has magnitudes beside them; PEFT does not know it, and wda alone writes it.
    """
    config = require(found, "r", "projection_prng_key")
    kinds = ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B", "vera_magnitude_vector")
    names = _sorted(found, *kinds)
    projections = _projections(names, config)
    forms: dict[str, Form] = {
        module: SharedFactors(
            _stored(names, "vera_lambda_b", module),
            _stored(names, "vera_lambda_d", module),
            projections,
        )
        for module in names["vera_lambda_b"]
    }
    for module in names["vera_magnitude_vector"]:
        magnitude = _stored(names, "vera_magnitude_vector", module)
        forms[module] = Decomposed(forms.get(module, Nothing(magnitude)), magnitude)
    return _contents(names, forms, str(config["peft_type"]).lower())


def read_weight_norm(found: Found) -> Contents:
    """Read weight normalisation as wda writes it: m, and V in the place of W0."""
    names = _sorted(found, "weight_m", "weight_v")
    forms: dict[str, Form] = {
        module: Decomposed(
            Whole(_stored(names, "weight_v", module)), _stored(names, "weight_m", module)
        )
        for module in names["weight_v"]
    }
    return _contents(names, forms, "weightnorm")


def _projections(names: Names, config: Mapping[str, Any]) -> Projections:
    """Give the projections that are stored once for all modules, or were not saved."""
    (a, *_), (b, *_) = ([*names[kind], None] for kind in ("vera_A", "vera_B"))
    if a is not None and b is not None:
        return StoredProjections(names.stored("vera_A", a), names.stored("vera_B", b))
    outs = ((m, names.stored("vera_lambda_b", m).shape[0]) for m in names["vera_lambda_b"])
    return DrawnProjections(config["r"], config["projection_prng_key"], tuple(sorted(outs)))


def read_loha(found: Found) -> Contents:
    """Read LoHa: s·(B1·A1) ⊙ (B2·A2), s = α/r."""
    require(found, "r", "alpha")
    names = _sorted(found, *(f"hada_{n}" for n in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")))
    forms: dict[str, Form] = {
        module: Hadamard(
            _product(names, module, "hada_w1_a", "hada_w1_b", "hada_t1"),
            _product(names, module, "hada_w2_a", "hada_w2_b", "hada_t2"),
            _lycoris_scaling(found, module),
        )
        for module in names["hada_w1_a"]
    }
    return _contents(names, forms, "loha")


def read_lokr(found: Found) -> Contents:
    """Read LoKr: s·(W1 ⊗ W2), s = α/r, each stored whole or as factors."""
    require(found, "r", "alpha")
    kinds = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    names = _sorted(found, *(f"lokr_{kind}" for kind in kinds))
    forms: dict[str, Form] = {}
    for module in sorted({*names["lokr_w1"], *names["lokr_w1_a"]}):
        left = ("lokr_w1",) if module in names["lokr_w1"] else ("lokr_w1_a", "lokr_w1_b")
        whole = module in names["lokr_w2"]
        right = ("lokr_w2",) if whole else ("lokr_w2_a", "lokr_w2_b", "lokr_t2")
        forms[module] = Kronecker(
            _product(names, module, *left),
            _product(names, module, *right),
            _lycoris_scaling(found, module),
        )
    return _contents(names, forms, "lokr")


def _lycoris_scaling(found: Found, module: str) -> float:
    """Give α/r of the configuration: matrices that are stored whole do not show r."""
    rank, alpha = rank_and_alpha(found, module)
    return alpha / rank


def _product(names: Names, module: str, *kinds: str) -> Product:
    """Give the factors of one product; the core of a kernel may be absent."""
    present = [kind for kind in kinds if module in names[kind] or kind in kinds[:2]]
    return Product(tuple(_stored(names, kind, module) for kind in present))


def read_oft(found: Found) -> Contents:
    """Read OFT: rotations of neighbouring input features."""
    config = found.config
    names = _sorted(found, "oft_R")
    cayley = Cayley(_series(found), config.get("eps") if config.get("coft") else None)
    forms: dict[str, Form] = {
        module: Rotated(_stored(names, "oft_R", module), cayley) for module in names["oft_R"]
    }
    return _contents(names, forms, "oft")


def _series(found: Found) -> tuple[float, ...] | None:
    """Give the coefficients of Q⁰, Q¹, … where the inverse is a series."""
    config = found.config
    absent = [f for f in ("use_cayley_neumann", "num_cayley_neumann_terms") if f not in config]
    if absent:
        raise CheckpointError(
            f"{found.folder / CONFIG_FILE}: {listing(absent)} missing, which tells how the "
            "rotations are formed; merge the adapter with the peft that trained it and compare "
            "the merged model"
        )
    if not config["use_cayley_neumann"]:
        return None
    terms = int(config["num_cayley_neumann_terms"])
    if "peft_version" not in config or written_by(config).stop <= _SERIES_CHANGED:
        return (1.0, *[2.0] * (terms - 1))
    return (1.0, *[2.0] * max(terms - 2, 2), 1.0) if terms > 2 else (1.0, *[2.0] * (terms - 1))


def read_boft(found: Found) -> Contents:
    """Read BOFT: rotations, and a factor for each output feature."""
    names = _sorted(found, "boft_R", "boft_s")
    forms: dict[str, Form] = {
        m: Rotated(_stored(names, "boft_R", m), Cayley(), _stored(names, "boft_s", m))
        for m in names["boft_R"]
    }
    return _contents(names, forms, "boft")


def read_ia3(found: Found) -> Contents:
    """Read (IA)³: a factor per output feature, in feed-forward modules per input feature."""
    names = _sorted(found, "ia3_l")
    forms: dict[str, Form] = {}
    for module in names["ia3_l"]:
        factors, axis = _stored(names, "ia3_l", module), _ia3_axis(found.config, module)
        forms[module] = Scaled(factors, axis)
        shape = found.tensors[factors.name].shape
        # Of a matrix the shape tells, too.
        if len(shape) == 2 and shape[1 if axis == "output" else 0] != 1:
            raise CheckpointError(
                f"{found.path}: ia3_l of {module} has the shape {shape}, which does not fit "
                f"feedforward_modules in {CONFIG_FILE}; weights and config must come from one "
                "training"
            )
    return _contents(names, forms, "ia3")


def _ia3_axis(config: Mapping[str, Any], module: str) -> Axis:
    said = config.get("feedforward_modules") or ()
    if isinstance(said, str):
        return "input" if re.fullmatch(said, module) else "output"
    return "input" if any(module.endswith(ending) for ending in said) else "output"


def _sorted(found: Found, *kinds: str, frozen: str = "") -> Names:
    """Sort an adapter's tensors by the ends of their names, with or without an adapter's name."""
    endings = {
        "frozen": re.compile(rf"\.base_layer\.weight$|\.original_module\.{frozen}"),
        **{kind: re.compile(rf"\.{kind}(\.[^.]+)?(\.weight)?$") for kind in kinds},
        "whole": WHOLE,
    }
    return sort_names(found.path, found.tensors, endings)


def _stored(names: Names, kind: str, module: str) -> Stored:
    """Give a module's tensor, which has to be there."""
    if module not in names[kind]:
        raise CheckpointError(
            f"{names.path}: {kind} is missing for {module}; all tensors of an adapter are needed; "
            "save it again, or copy it again"
        )
    return names.stored(kind, module)


def _contents(names: Names, forms: dict[str, Form], method: str) -> Contents:
    """Add the modules that were trained whole beside the adapter."""
    whole = {m: Whole(names.stored("whole", m)) for m in names["whole"] if m not in forms}
    return Contents({**whole, **forms}, method, names.frozen)
