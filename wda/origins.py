"""What W0 is of adapters that were trained on a quantised model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from wda.checkpoints import Adapter, FullCheckpoint, TrainedOn, open_base
from wda.errors import ManifestError
from wda.locations import locate, of_model_reference
from wda.manifest import W0
from wda.places import shown
from wda.runs import Member


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
