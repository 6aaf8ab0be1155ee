"""The checks: measures against limits.

The limits are rules of thumb. Each check tells its number, so that a reader can judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from wda.checkpoints import Checkpoint
from wda.diagnosis.measures import Measures
from wda.errors import listing

Verdict = Literal["ok", "suspicious", "wrong"]

# Magnitudes within bfloat16's rounding of ‖W0‖ have not moved.
_UNMOVED = 2.0**-8
# Magnitudes further than this from ‖W0‖, in the median, are not those of a fine-tuned W0.
_FAR = 0.25
# A rank correlation above the first is one, below the second is none.
_CORRELATED, _UNCORRELATED = 0.8, 0.5
# An update of this size, relative to W0, is more than fine-tuning does by itself.
_LARGE_UPDATE = 0.3
# Unrelated weights of one size are √2 apart.
_UNRELATED = 1.0


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes
    ----------
    verdict : {"ok", "suspicious", "wrong"}
        How it is judged.
    check : str
        What was looked at.
    number : str
        What was measured.
    advice : str
        What to do; empty where all is well.
    """

    verdict: Verdict
    check: str
    number: str
    advice: str = ""


def _finite(measured: Sequence[Measures], _: Checkpoint) -> Finding:
    bad = [one.module for one in measured if not one.finite]
    if not bad:
        return Finding("ok", "numbers are finite", "all")
    return Finding(
        "wrong",
        "numbers are finite",
        f"NaN or Inf in {listing(bad, 3)}",
        "the training diverged or the file is damaged: take an earlier checkpoint",
    )


def _trained(measured: Sequence[Measures], _: Checkpoint) -> Finding:
    still = [one.module for one in measured if one.relative_update == 0]
    number = f"{len(measured) - len(still)} of {len(measured)} matrices differ from W0"
    if not still:
        return Finding("ok", "weights moved", number)
    return Finding(
        "wrong" if len(still) == len(measured) else "suspicious",
        "weights moved",
        number,
        f"B is zero, or the matrix is W0's, in {listing(still, 3)}: were they frozen, or is this "
        "the checkpoint of step 0?",
    )


def _related(measured: Sequence[Measures], _: Checkpoint) -> Finding:
    middle = median(one.relative_update for one in measured)
    number = f"‖Wt−W0‖/‖W0‖ is {middle:.2g} in the median"
    turned = [
        one
        for one in measured
        if one.permuted_update is not None and one.permuted_update < one.relative_update / 3
    ]
    if turned:
        return Finding(
            "wrong",
            "Wt belongs to W0",
            f"{len(turned)} queries or keys are nearer to W0's rows in another order",
            "their rows are ordered for rotary embeddings of neighbouring pairs, as Meta's, "
            "torchtune's and GGUF's are: convert the checkpoint, or take the base in that layout",
        )
    if middle > _UNRELATED:
        return Finding(
            "wrong",
            "Wt belongs to W0",
            number,
            "weights as far apart as unrelated ones: this is not the base, or not its revision; or "
            "the scaling is wrong",
        )
    if middle > _LARGE_UPDATE:
        return Finding(
            "suspicious",
            "Wt belongs to W0",
            number,
            "more than fine-tuning does: look at α, and whether the initialiser took the adapter "
            "off W0 (PiSSA, OLoRA, a residual model)",
        )
    return Finding("ok", "Wt belongs to W0", number)


def _merged_twice(measured: Sequence[Measures], checkpoint: Checkpoint) -> Finding | None:
    sure = [one for one in measured if one.chance_overlap < 0.2 and one.relative_update > 0]
    if checkpoint.holds_all() or not sure:
        return None
    middle = median(one.overlap for one in sure)
    number = f"W0 has {middle:+.2f} times the update in it"
    if middle < 0.5:
        return Finding("ok", "merged once", number)
    return Finding(
        "wrong" if middle > 0.8 else "suspicious",
        "merged once",
        number,
        "the base seems to be the merged model already: give the one the training started from",
    )


def _rounded(measured: Sequence[Measures], _: Checkpoint) -> Finding | None:
    moved = [one for one in measured if one.relative_update > 0]
    if not moved:
        return None
    worst = max(moved, key=lambda one: one.lost)
    number = f"at most {worst.lost:.1%} of an update, in {worst.module}"
    if worst.lost < 0.5:
        return Finding("ok", "rounding is small", number)
    return Finding(
        "suspicious",
        "rounding is small",
        number,
        "in the base's dtype the update is hardly more than rounding: save float32, and do not "
        "merge into this dtype",
    )


def _magnitudes_moved(measured: Sequence[Measures], _: Checkpoint) -> Finding | None:
    known = [one.magnitudes for one in measured if one.magnitudes]
    if not known:
        return None
    moved = max(m.moved for m in known)
    number = f"|m/‖W0‖−1| is at most {moved:.2g}"
    if moved > _UNMOVED:
        return Finding("ok", "magnitudes moved", number)
    return Finding(
        "wrong",
        "magnitudes moved",
        number,
        "magnitudes are still ‖W0‖: the trainer did not train them, and a version that does is "
        "needed; or this base is the merged model",
    )


def _magnitudes_fit(measured: Sequence[Measures], _: Checkpoint) -> Finding | None:
    known = [(one.module, one.magnitudes) for one in measured if one.magnitudes]
    if not known:
        return None
    reasons: dict[str, list[str]] = {"other axis": [], "other order": [], "none": []}
    for module, m in known:
        fits = m.along > _UNCORRELATED and m.deviation < _FAR
        if (m.across or 0) > max(_CORRELATED, m.along):
            reasons["other axis"].append(module)
        elif (m.permuted or 0) > max(_CORRELATED, m.along):
            reasons["other order"].append(module)
        elif not fits and (m.along < _UNCORRELATED or m.deviation > 2 * _FAR):
            reasons["none"].append(module)
    middle = median(m.along for _, m in known)
    number = f"rank correlation with ‖W0‖ is {middle:.2f} in the median"
    advice = {
        "other axis": "have the numbers of the other axis (one per input feature for one per "
        "output, or the other way round): convert them, or read them with --axis",
        "other order": "have query's or key's rows in the order of another layout, as torchtune's "
        "export leaves them: read its adapter_model.pt instead",
        "none": "fit no axis of W0: they come from a random layer, or this is not the base",
    }
    for reason, modules in reasons.items():
        if modules:
            found = f"{number}; {len(modules)} of {len(known)} do not fit ({listing(modules, 2)})"
            return Finding("wrong", "magnitudes fit W0", found, f"they {advice[reason]}")
    return Finding("ok", "magnitudes fit W0", number)


CHECKS: tuple[Callable[[Sequence[Measures], Checkpoint], Finding | None], ...] = (
    _finite,
    _trained,
    _related,
    _merged_twice,
    _magnitudes_moved,
    _magnitudes_fit,
    _rounded,
)
