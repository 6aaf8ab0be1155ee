"""What a comparison would read, told from the headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wda.checkpoints import Checkpoint, FullCheckpoint
from wda.pairing import Pairing
from wda.runs import Member


@dataclass(frozen=True)
class Reading:
    """What is read of one checkpoint.

    Attributes
    ----------
    run : str
        Name of the run; ``"base"`` for the model that all are compared with.
    step : int or None
        Training step, where known.
    location : str
        Where the checkpoint lies.
    tensors : int
        How many tensors are read.
    tensor_bytes : int
        Their size in bytes.
    header_bytes : int
        Bytes read beforehand to know them; small JSON files are not counted.
    """

    run: str
    step: int | None
    location: str
    tensors: int
    tensor_bytes: int
    header_bytes: int


def readings(
    base: FullCheckpoint, members: Sequence[Member], pairings: Sequence[Pairing]
) -> list[Reading]:
    """Tell what is read of the base and of each checkpoint; no tensor is.

    Parameters
    ----------
    base : FullCheckpoint
        The pre-trained model.
    members : sequence of Member
        All checkpoints of all runs.
    pairings : sequence of Pairing
        The matrices that are compared.

    Returns
    -------
    list of Reading
        The base first, then the checkpoints in their order. A tensor that holds several of the
        matrices counts once.
    """
    modules: dict[int, list[str]] = {id(member): [] for member in members}
    for pairing in pairings:
        for source in pairing.sources:
            modules[id(source.member)].append(source.module)
    found = [_reading("base", None, base, [pairing.matrix.module for pairing in pairings])]
    for member in members:
        reading = _reading(member.run, member.step, member.checkpoint, modules[id(member)])
        found.append(reading)
    return found


def _reading(run: str, step: int | None, checkpoint: Checkpoint, modules: Iterable[str]) -> Reading:
    tensors = checkpoint.tensors
    names = {name for module in modules for name in checkpoint.tensors_of(module)}
    size = sum(tensors[name].nbytes for name in names)
    return Reading(run, step, str(checkpoint.path), len(names), size, tensors.header_bytes)
