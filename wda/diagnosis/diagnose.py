"""Opens a checkpoint beside its base, and has all checks look at it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from wda.checkpoints import Checkpoint, FullCheckpoint, Given, open_named_base
from wda.checkpoints.given import NOTHING_GIVEN
from wda.diagnosis.checks import CHECKS, Finding
from wda.diagnosis.measures import Measures, measure
from wda.errors import LocationError, WdaError, blaming, listing
from wda.locations import locate
from wda.manifest import make_manifest
from wda.origins import never_saw
from wda.pairing import pair
from wda.places import shown
from wda.progress import progress_bar
from wda.runs import open_runs

# Biases and the scales of norms, which change no matrix.
_BESIDE = re.compile(r"\.bias$|(norm|ln)[^.]*\.(weight|scale)$", re.IGNORECASE)


def diagnose(
    location: str | Path,
    base: str | Path | None = None,
    given: Given = NOTHING_GIVEN,
    progress: bool = True,
) -> list[Finding]:
    """Check a checkpoint, of a run the newest, against its base.

    Parameters
    ----------
    location : path or location
        A checkpoint of any layout.
    base : path or location, optional
        The model it was fine-tuned from; by default what it names itself.
    given : Given
        What the checkpoint does not say itself.
    progress : bool
        Whether to show a progress bar on standard error.

    Returns
    -------
    list of Finding
        One per check that applies. What cannot be read at all is one that is wrong.

    Raises
    ------
    LocationError
        When there is nothing at a location, or no base is known.
    """
    manifest = make_manifest(str(location), given=given)
    locate(manifest.runs[0].path)
    try:
        member = open_runs(manifest.runs)[-1]
        checkpoint = member.checkpoint
        _, whole = open_named_base([checkpoint], base)
        every = f"re:^({'|'.join(_changed(checkpoint, whole))})$"
        pairings, notes = pair(whole, [member], [every])
    except LocationError:
        raise
    except WdaError as error:
        return [Finding("wrong", "can be read", "no", str(error))]
    measured: list[Measures] = []
    with progress_bar(progress) as bar:
        task = bar.add_task("looking", total=len(pairings), note="")
        for pairing in pairings:
            with blaming(checkpoint.path):
                measured.extend(
                    measure(checkpoint, source.module, pairing.matrix, whole)
                    for source in pairing.sources
                )
            bar.update(task, advance=1, note=str(pairing.matrix))
    findings = [Finding("ok", "can be read", f"{checkpoint.layout}, {len(measured)} matrices")]
    findings += _left_over(checkpoint, notes)
    findings += _base_name(checkpoint, base)
    if (why := never_saw(checkpoint, whole)) is not None:
        said, _, advice = why.partition("; ")
        findings.append(Finding("suspicious", "W0 is what it was trained on", said, advice))
    return findings + [found for check in CHECKS if (found := check(measured, checkpoint))]


def _changed(checkpoint: Checkpoint, base: FullCheckpoint) -> list[str]:
    """Give patterns for the base's modules that a checkpoint holds."""
    names = checkpoint.names_in(base).values()
    return [name.replace(".", "[.]") for name in names]


def _left_over(checkpoint: Checkpoint, notes: Sequence[str]) -> list[Finding]:
    new = [note.partition(": ")[2] for note in notes if "the base has none" in note]
    found = [Finding("ok", "all is paired", "; ".join(new) or "yes")]
    if checkpoint.unread:
        number = f"not {len(checkpoint.unread)}: {listing(checkpoint.unread, 3)}"
        if all(map(_BESIDE.search, checkpoint.unread)):
            number += ", trained or kept beside the matrices, and not measured"
            return [*found, Finding("ok", "all tensors are read", number)]
        advice = "tensors that no one reads: make sure that they do not belong to the weights"
        found.append(Finding("suspicious", "all tensors are read", number, advice))
    return found


def _base_name(checkpoint: Checkpoint, base: str | Path | None) -> list[Finding]:
    if base is None or not checkpoint.base:
        return []
    named, at = (shown(str(one)).rstrip("/").rpartition("/")[2] for one in (checkpoint.base, base))
    if named.partition("@")[0] == at.partition("@")[0]:
        return [Finding("ok", "the base is the one it names", named)]
    advice = "make sure that they are the same model and revision"
    return [Finding("suspicious", "the base is the one it names", f"{named}, not {at}", advice)]
