"""What a checkpoint is: its layout and why, its method, its matrices, what of it is not read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from wda.checkpoints import Adapter, Checkpoint, FullCheckpoint, Given
from wda.checkpoints.given import NOTHING_GIVEN
from wda.manifest import make_manifest
from wda.naming import find_matrices, layer_index, matrix_label, natural_order
from wda.places import shown
from wda.runs import Member, open_runs


@dataclass(frozen=True)
class Held:
    """One matrix that a checkpoint holds or changes.

    Attributes
    ----------
    module, label : str
        Path of its module in the checkpoint, and its role.
    layer : int or None
        The first number in that path.
    shape : tuple
        (out_features, in_features); None where only the base knows.
    dtype : str
        How its numbers are stored, as the file says.
    update : str
        What Wt is made of: the weight itself, factors, factors and a magnitude, or that alone.
    rank : int or None
        Rank of the factors.
    scaling : float or None
        The factor s before their product.
    """

    module: str
    label: str
    layer: int | None
    shape: tuple[int | None, int | None]
    dtype: str
    update: str
    rank: int | None = None
    scaling: float | None = None


@dataclass(frozen=True)
class Inspection:
    """What one checkpoint is.

    Attributes
    ----------
    location, layout, evidence : str
        Where it lies, what it was taken for, and why.
    method : str
        How it was trained.
    step : int or None
        Its training step.
    base : str or None
        What it says it was fine-tuned from.
    files : dict
        Name → bytes of the files that hold its tensors.
    matrices : tuple of Held
        What it holds or changes.
    unread : tuple of str
        Tensors beside the matrices, such as biases, and what means nothing to the reader.
    """

    location: str
    layout: str
    evidence: str
    method: str
    step: int | None
    base: str | None
    files: dict[str, int]
    matrices: tuple[Held, ...]
    unread: tuple[str, ...]


def inspect(location: str, given: Given = NOTHING_GIVEN) -> list[Inspection]:
    """Tell what lies at a location, from headers and configurations alone.

    Parameters
    ----------
    location : str
        A run, with its checkpoints, or one checkpoint; of any kind that ``wda compare`` takes.
    given : Given
        What the checkpoints do not say themselves.

    Returns
    -------
    list of Inspection
        One per checkpoint, in the order of their steps.

    Raises
    ------
    WdaError
        When nothing is there, or it cannot be read.
    """
    return [_inspected(member) for member in open_runs(make_manifest(location, given=given).runs)]


def _inspected(member: Member) -> Inspection:
    checkpoint = member.checkpoint
    matrices = tuple(_held(checkpoint))
    return Inspection(
        location=str(checkpoint.path),
        layout=checkpoint.layout,
        evidence=checkpoint.evidence,
        method=member.method,
        step=member.step,
        base=shown(checkpoint.base) if checkpoint.base else None,
        files={file.name: file.stat().st_size for file in checkpoint.files},
        matrices=matrices,
        unread=checkpoint.unread,
    )


def _held(checkpoint: Checkpoint) -> Iterable[Held]:
    if isinstance(checkpoint, FullCheckpoint):
        for m in find_matrices(checkpoint.tensors.shapes, config=checkpoint.config):
            dtype = _dtype(checkpoint, m.module)
            yield Held(m.module, m.label, m.layer, m.shape, dtype, "the weight itself")
        return
    assert isinstance(checkpoint, Adapter)
    for module in sorted(checkpoint.modules, key=natural_order):
        form = checkpoint.forms[module]
        yield Held(
            module,
            matrix_label(module),
            layer_index(module),
            form.shape,
            _dtype(checkpoint, module),
            form.words,
            form.rank,
            form.scale,
        )


def _dtype(checkpoint: Checkpoint, module: str) -> str:
    """Give the dtype of a module's tensors as the file says, several where they differ."""
    stored = (checkpoint.tensors[name].stored for name in checkpoint.tensors_of(module))
    return ", ".join(dict.fromkeys(words.split()[0].removeprefix("torch.") for words in stored))
