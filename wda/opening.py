"""Everything that is to be compared, opened and paired; no tensor is read yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.progress import Progress

from wda.checkpoints import FullCheckpoint, open_named_base
from wda.files import describe
from wda.manifest import Manifest
from wda.origins import notes_on_origins, on_what_they_were_trained
from wda.pairing import Pairing, pair
from wda.places import shown
from wda.runs import Member, open_runs


@dataclass(frozen=True)
class Opened:
    """What a comparison is of.

    Attributes
    ----------
    base_location : str
        Where the base lies, as a user may read it.
    base : FullCheckpoint
        The pre-trained model.
    members : sequence of Member
        All checkpoints of all runs.
    pairings : sequence of Pairing
        Every wanted matrix of the base, with its updates.
    notes : sequence of str
        What was left out and why, and what is doubtful.
    """

    base_location: str
    base: FullCheckpoint
    members: Sequence[Member]
    pairings: Sequence[Pairing]
    notes: Sequence[str]


def open_all(manifest: Manifest, bar: Progress) -> Opened:
    """Open the checkpoints of all runs and their base, and pair their matrices.

    Parameters
    ----------
    manifest : Manifest
        What is to be compared.
    bar : Progress
        Where it is shown how far this is.

    Raises
    ------
    WdaError
        One of its kinds, when something does not exist, cannot be read or does not fit.
    """
    task = bar.add_task("opening", total=None, note="")
    members = open_runs(
        manifest.runs,
        on_found=lambda checkpoints: bar.update(task, total=checkpoints + 1),  # and the base
        on_opened=lambda: bar.advance(task),
    )
    location, base = open_named_base([member.checkpoint for member in members], manifest.base)
    doubts = notes_on_origins(members, base, manifest.w0)
    members = on_what_they_were_trained(members, base, manifest.w0)
    bar.update(task, advance=1, note="pairing matrices")
    pairings, notes = pair(base, members, manifest.matrices)
    bar.update(task, note="")
    return Opened(shown(location), base, members, pairings, [*doubts, *notes])


def provenance_of(manifest: Manifest, opened: Opened) -> dict[str, object]:
    """Tell what a comparison is of: choices, checkpoints and base, with their files."""
    return {
        "per": manifest.per,
        "matrices": manifest.matrices,
        "checkpoints": [
            {
                "run": member.run,
                "method": member.method,
                "seed": member.seed,
                "step": member.step,
                "layout": member.checkpoint.layout,
                "path": str(member.checkpoint.path),
                "files": [
                    {"file": file.name, "bytes": file.stat().st_size}
                    for file in member.checkpoint.files
                ],
            }
            for member in opened.members
        ],
        "w0": manifest.w0 or ("dequantized" if opened.base.quantised else "as stored"),
        "base": {
            "location": opened.base_location,
            "quantised": opened.base.quantised,
            "files": describe(opened.base.files),
        },
    }
