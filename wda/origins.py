"""What W0 is of adapters that were trained on a quantised model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from wda.checkpoints import Adapter, Checkpoint, FullCheckpoint, TrainedOn, open_base
from wda.checkpoints.found import Found
from wda.errors import ManifestError
from wda.locations import locate, of_model_reference
from wda.manifest import W0
from wda.places import shown
from wda.runs import Member

# What publishers put into the name of a quantised model.
_QUANTISED_NAME = re.compile(
    r"(^|[-_.])(bnb|[2-8]-?bits?|int[2-8]|nf4|fp4|fp8|gptq|awq|hqq|aqlm|gguf|w[48]a\d+)(?=$|[-_.])",
    re.IGNORECASE,
)


def on_what_they_were_trained(
    members: Sequence[Member], base: FullCheckpoint, w0: W0 | None
) -> list[Member]:
    """Put adapters onto the quantised weights they were trained on, and call them so.

    Parameters
    ----------
    members : sequence of Member
        The checkpoints.
    base : FullCheckpoint
        What they are compared with.
    w0 : {"original", "dequantized"} or None
        What was asked for: the base before it was quantised, or the weights that adapters saw.

    Returns
    -------
    list of Member
        The same, with methods such as ``qlora``.

    Raises
    ------
    ManifestError
        When the base, or the model of an adapter, is not what the choice needs.
    """
    if w0 == "original" and base.quantised:
        raise ManifestError(
            f"w0: is to be the original, and the base {base.path} is {base.quantised}; give the "
            "original model with --base, and the quantised one with --trained-on if the adapters "
            "do not name it"
        )
    if w0 == "dequantized" and not base.quantised:
        raise ManifestError(
            f"w0: is to be dequantized, and the base {base.path} is not quantised; give the "
            "quantised model with --base; one that was quantised while it was loaded can be saved "
            "with save_pretrained()"
        )
    if w0 == "original":
        members = [_on_its_model(member) for member in members]
    return [
        replace(member, method=f"q{member.method}")
        if member.method in ("lora", "dora") and (base.quantised or w0 == "original")
        else member
        for member in members
    ]


def _on_its_model(member: Member) -> Member:
    """Put an adapter onto the quantised model that it was trained on."""
    adapter = member.checkpoint
    if not isinstance(adapter, Adapter):
        return member
    location = adapter.given.trained_on or of_model_reference(adapter.base or "")
    if not location:
        raise ManifestError(
            f"{adapter.path}: names no model it was trained on; give the quantised one with "
            "--trained-on LOCATION"
        )
    model = open_base(locate(location))
    if model.quantised in (None, "awq"):
        why = (
            "is not quantised; give the quantised model with --trained-on"
            if model.quantised is None
            else "was quantised by AWQ, which moves scales from one layer's weights into "
            "another's: they cannot be compared with the original; take --w0 dequantized"
        )
        raise ManifestError(f"{shown(location)}: {why}")
    return replace(member, checkpoint=TrainedOn(adapter, model))


def notes_on_origins(members: Iterable[Member], base: FullCheckpoint, w0: W0 | None) -> list[str]:
    """Say of which runs W0 is no weight that their training saw, though nobody chose that.

    Parameters
    ----------
    members : iterable of Member
        The checkpoints.
    base : FullCheckpoint
        What they are compared with.
    w0 : {"original", "dequantized"} or None
        What was asked for.

    Returns
    -------
    list of str
        One note per run.
    """
    notes = (
        f"{member.run}: {why}"
        for member in members
        if w0 is None and (why := never_saw(member.checkpoint, base)) is not None
    )
    return list(dict.fromkeys(notes))


def never_saw(adapter: Checkpoint, base: FullCheckpoint) -> str | None:
    """Say why a base's weights are not those that an adapter was trained on, but for quantisation.

    None where the base is quantised itself, or nothing tells of an adapter that it was trained on a
    model that is.
    """
    if base.quantised or not isinstance(adapter, Adapter):
        return None
    if (model := _quantised_model(adapter)) is None:
        return None
    return (
        f"was trained on {model}, and the base {shown(base.path)} is not quantised: the training "
        "saw other weights; give that model as --base (what was learned alone), or --w0 original "
        "(with the quantisation)"
    )


def _quantised_model(adapter: Adapter) -> str | None:
    """Name the quantised model that an adapter says it was trained on."""
    if adapter.quantised:
        return f"the {adapter.quantised} weights that lie beside its factors"
    named = str(adapter.given.trained_on or adapter.base or "")
    here = Path(named)
    if here.exists():
        return f"the quantised {shown(named)}" if Found(here).quantisation() else None
    last = named.rstrip("/").rpartition("/")[2].partition("@")[0]
    by_name = _QUANTISED_NAME.search(last) and "unquantized" not in last.lower()
    return f"{shown(named)}, by its name a quantised model" if by_name else None
