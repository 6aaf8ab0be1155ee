"""LoRA, rsLoRA and DoRA.

Keys end in ``lora_A.weight`` (rank, in), ``lora_B.weight`` (out, rank) and, for DoRA,
``lora_magnitude_vector`` (out,), with or without ``.weight``; a model's own state dict has the
adapter's name in between. The factors have these shapes for ``Conv1D`` too, whose base weight is
stored as (in, out). Those of a convolution have its kernel in A. An embedding's are
``lora_embedding_A`` (rank, tokens) and ``lora_embedding_B`` (features, rank), its magnitudes one
for each feature.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from wda.checkpoints.factors import Names, sort_names
from wda.checkpoints.forms import Axis, Decomposed, Factors, Form, Stored
from wda.checkpoints.found import CONFIG_FILE, Found
from wda.checkpoints.fused_forms import BlockDiagonal
from wda.checkpoints.peft import tokens
from wda.checkpoints.peft.contents import WHOLE, Contents, require
from wda.checkpoints.peft.experts import split_experts
from wda.checkpoints.peft.initial import start_of
from wda.checkpoints.peft.versions import rank_and_alpha, written_by
from wda.checkpoints.rebased import StoredStart, started_from
from wda.errors import CheckpointError, listing

# What wda calls DoRA with a magnitude per input feature; PEFT would divide by other lengths.
PER_INPUT = "DORA_PER_INPUT"

# What a tensor is → how its name ends, after the module's path.
_ENDINGS = {
    "A": re.compile(r"\.lora_A(\.[^.]+)?\.weight$"),
    "B": re.compile(r"\.lora_B(\.[^.]+)?\.weight$"),
    "embedding_A": re.compile(r"\.lora_embedding_A(\.[^.]+)?$"),
    "embedding_B": re.compile(r"\.lora_embedding_B(\.[^.]+)?$"),
    "magnitude": re.compile(r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?$"),
    "tokens": tokens.ENDING,
    "frozen": re.compile(r"\.original_module\.|\.token_adapter\."),
    "start": re.compile(r"\.base_layer\.weight$"),
    "whole": WHOLE,
}

# Settings that change the algebra of the update, and what they do.
_REFUSED = {
    "use_qalora": "adds to a weight quantised in groups, which is not W0",
    "alora_invocation_tokens": "changes some tokens of a text and not others, so there is no Wt",
    "arrow_config": "chooses among adapters for every token, so there is no Wt",
}

# DoRA divided by the lengths of the wrong axis of a Conv1D before this release.
_CONV1D_MENDED = 11

_FLOATING = re.compile(r"(torch\.)?(bfloat16|float(16|32|64)|BF16|F(16|32|64))\b")


def read(found: Found) -> Contents:
    """Read an adapter of factors."""
    _check_config(found)
    names = sort_names(found.path, found.tensors, _ENDINGS)
    if found.config.get("enable_lora"):
        return Contents(_merged_linears(found, names), "lora", names.frozen)
    experts, names = split_experts(found, names, partial(_scaled, found))
    scalings = {module: _scaling(found, module, names.rank(module)) for module in names["A"]}
    axis: Axis = "input" if found.config.get("peft_type") == PER_INPUT else "output"
    forms = names.forms(scalings.__getitem__, lambda _module: axis)
    forms |= experts
    forms |= _embeddings(found, names)
    forms |= tokens.replaced_rows(names, found.config, "trainable_token_indices")
    _check_magnitudes(found.config, names)
    _start(found, names, forms)
    forms = _in_base_layers(found, forms)
    method = "dora" if found.config.get("use_dora") else "lora"
    # The base under a factor is W0, also where nothing starts from it because it is packed.
    return Contents(forms, method, [*names.frozen, *names["start"].values()])


def described(found: Found) -> Found:
    """Describe the state dict of a PeftModel, whose configuration was not kept, by its names.

    Raises
    ------
    CheckpointError
        When the user does not give α.
    """
    if found.given.alpha is None:
        raise CheckpointError(
            f"{found.path}: holds a PeftModel's LoRA without {CONFIG_FILE}, which has its α; put "
            "that file beside it, or give α with --alpha (alpha in a manifest); with rsLoRA, give "
            "α·√r"
        )
    magnitudes = any(".lora_magnitude_vector" in name for name in found.tensors)
    return found.with_config(
        {"peft_type": "LORA", "lora_alpha": found.given.alpha, "use_dora": magnitudes}
    )


def _scaling(found: Found, module: str, rank: int) -> float:
    """Give the factor s of a module: α/r, or α/√r for rsLoRA, with the module's own α and r."""
    if "r" not in found.config:
        return float(found.config["lora_alpha"]) / rank
    declared, alpha = rank_and_alpha(found, module, rank)
    if rank != declared:
        raise CheckpointError(
            f"{found.path}: factors that do not fit {CONFIG_FILE}: {module} (rank {rank} in the "
            f"file, {declared:g} in the config); weights and config must come from one training"
        )
    return _scaled(found, rank, alpha)


def _scaled(found: Found, rank: int, alpha: float) -> float:
    return alpha / (math.sqrt(rank) if found.config.get("use_rslora") else rank)


def _in_base_layers(found: Found, forms: dict[str, Form]) -> dict[str, Form]:
    """Name modules after the base's layers that ``layer_replication`` made theirs of.

    Raises
    ------
    CheckpointError
        When a layer of the base serves several, each with an update of its own.
    """
    ranges = found.config.get("layer_replication")
    if not ranges:
        return forms
    layers = [layer for start, end in ranges for layer in range(start, end)]
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise CheckpointError(
            f"{found.folder / CONFIG_FILE}: layer_replication uses layer {listing(twice)} of the "
            "base twice, and each copy has an update of its own, where a table has one row for "
            "each matrix of the base; merge the adapter with peft and compare the copies' weights"
        )
    return {_in_layer(module, layers): form for module, form in forms.items()}


def _in_layer(module: str, layers: Sequence[int]) -> str:
    """Put the base's layer for the first number in a module's path."""
    return re.sub(r"(^|\.)(\d+)(?=\.|$)", lambda m: f"{m[1]}{layers[int(m[2])]}", module, count=1)


def _merged_linears(found: Found, names: Names) -> dict[str, Form]:
    """Give the forms of fused projections of which ``enable_lora`` says what parts are trained.

    B belongs to a grouped convolution (rows, rank, 1), each of whose groups sees its share of A.
    """
    forms: dict[str, Form] = {}
    enabled, scaling = found.config["enable_lora"], found.config["lora_alpha"] / found.config["r"]
    for module in names["A"]:
        a, b = names.stored("A", module), names.stored("B", module)
        part, groups = b.shape[0] // sum(enabled), a.shape[0] // b.shape[1]
        rows = [i * part + row for i, on in enumerate(enabled) if on for row in range(part)]
        share = len(rows) // groups
        blocks = tuple(_ranges(rows[g * share : (g + 1) * share]) for g in range(groups))
        forms[module] = BlockDiagonal(a, b, blocks, part * len(enabled), scaling)
    return forms


def _ranges(rows: Sequence[int]) -> tuple[range, ...]:
    """Put rows into ranges of neighbours."""
    breaks = [i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1]
    edges = [0, *breaks, len(rows)]
    return tuple(range(rows[i], rows[j - 1] + 1) for i, j in pairwise(edges))


def _embeddings(found: Found, names: Names) -> dict[str, Form]:
    """Give the forms of embeddings, whose weight (tokens, features) adds the transpose of B·A."""
    alone = set(names["embedding_A"]) ^ set(names["embedding_B"])
    if alone:
        raise CheckpointError(
            f"{names.path}: lora_embedding_A and lora_embedding_B do not belong together; only one "
            f"of the two exists for {listing(sorted(alone))}"
        )
    forms: dict[str, Form] = {}
    for module in names["embedding_A"]:
        a, b = (names[f"embedding_{kind}"][module] for kind in "AB")
        features, words = Stored(found.tensors, b, True), Stored(found.tensors, a, True)
        form: Form = Factors(features, words, _scaling(found, module, words.shape[1]))
        if module in names["magnitude"]:
            form = Decomposed(form, names.stored("magnitude", module), "input")
        forms[module] = form
    return forms


def _start(found: Found, names: Names, forms: dict[str, Form]) -> None:
    """Let forms start from the base that was trained on, where that is not W0 or is at hand."""
    stored = {
        module
        for module, name in names["start"].items()
        if _FLOATING.match(found.tensors[name].stored)  # a quantised base is packed
    }
    for module in stored & {*names["A"], *names["embedding_A"]}:
        forms[module] = started_from(StoredStart(names.stored("start", module)), forms[module])
    others = sorted(set(names["A"]) - stored)
    start = start_of(found, others) if others else None
    for module in others if start is not None else ():
        rank, scaling = forms[module].rank, forms[module].scale
        assert start is not None and rank is not None and scaling is not None
        forms[module] = started_from(start(module, rank, scaling), forms[module])


def _check_config(found: Found) -> None:
    """Refuse what cannot be read right."""
    config, config_file = found.config, found.folder / CONFIG_FILE
    if found.has(CONFIG_FILE) is not None:
        require(found, "r", "lora_alpha")
    refused = [f"{field} {why}" for field, why in _REFUSED.items() if config.get(field)]
    if refused:
        raise CheckpointError(f"{config_file}: {listing(refused)}; it cannot be compared")
    if (
        config.get("use_dora")
        and config.get("fan_in_fan_out")
        and (written_by(config).start < _CONV1D_MENDED)
    ):
        raise CheckpointError(
            f"{config_file}: peft before 0.11 divided a Conv1D's DoRA by the lengths of the wrong "
            'axis, and nothing tells that this adapter is newer; add "peft_version" with the '
            "version that trained it, or merge it with that version and compare the merged model"
        )


def _check_magnitudes(config: Mapping[str, Any], names: Names) -> None:
    if not config.get("use_dora"):
        if names["magnitude"]:
            raise CheckpointError(
                f"{names.path}: has lora_magnitude_vector tensors but use_dora is not true in "
                f"{CONFIG_FILE}; set it if this is a DoRA adapter"
            )
        return
    names.require_magnitudes(
        {*names["A"], *names["embedding_A"]},
        "use_dora is true but lora_magnitude_vector is missing",
        "save the adapter again with its magnitudes",
    )
