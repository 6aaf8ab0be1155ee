"""Which matrix of the base each matrix of each checkpoint belongs to, and what fits nowhere.

Everything is paired by name. A tensor that is missing where it must be, or has another shape, is
an error that names all of them; none is ever taken for unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wda.checkpoints import Checkpoint, FullCheckpoint
from wda.errors import PairingError, SelectionError, blaming, listing
from wda.naming import Matrix, find_matrices, is_matrix, may_be_wanted, select
from wda.runs import Member


@dataclass(frozen=True)
class Source:
    """Where the update of one matrix comes from: a checkpoint, and its name for the module."""

    member: Member
    module: str

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint of the member."""
        return self.member.checkpoint


@dataclass(frozen=True)
class Pairing:
    """One matrix of the base and every update of it."""

    matrix: Matrix
    sources: tuple[Source, ...]


def pair(
    base: FullCheckpoint, members: Sequence[Member], wanted: Sequence[str]
) -> tuple[list[Pairing], list[str]]:
    """Pair the wanted matrices of the base with the checkpoints.

    Parameters
    ----------
    base : FullCheckpoint
        The pre-trained model.
    members : sequence of Member
        All checkpoints of all runs.
    wanted : sequence of str
        Labels, last names or ``re:`` patterns; see :func:`wda.naming.select`.

    Returns
    -------
    pairings : list of Pairing
        In the base's order.
    notes : list of str
        What was left out and why, for the user to read.

    Raises
    ------
    SelectionError
        When a word selects no matrix of the base, or nothing of one of the runs.
    PairingError
        When tensors are missing on either side or have other shapes.
    """
    for member in members:
        _refuse_folded(member.checkpoint, base)
    names = [_names_in_base(member, base) for member in members]
    selected = _select(base, members, names, wanted)
    sources: dict[Matrix, list[Source]] = {matrix: [] for matrix in selected}
    notes: list[str] = []
    problems: list[str] = []
    for member, in_base in zip(members, names, strict=True):
        held = [matrix for matrix in selected if matrix.module in in_base]
        with blaming(member.checkpoint.path):
            problems.extend(_problems(member, in_base, base, selected))
        if not held and not member.checkpoint.holds_all():
            changed = {
                m.label
                for m in find_matrices(base.tensors.shapes, config=base.config)
                if m.module in in_base
            }
            raise SelectionError(
                f"{member.checkpoint.path}: this adapter changes none of the matrices "
                f"{', '.join(wanted)}; it changes {listing(sorted(changed))}; choose those"
            )
        notes.extend(_notes(member, in_base, base, selected))
        for matrix in held:
            sources[matrix].append(Source(member, in_base[matrix.module]))
    if problems:
        raise PairingError(
            f"checkpoints and base do not fit ({len(problems)} found): " + "; ".join(problems)
        )
    if others := _no_matrices(base, wanted):
        notes.append(f"left out of {', '.join(wanted)}: {others}")
    pairings = [Pairing(matrix, tuple(found)) for matrix, found in sources.items() if found]
    return pairings, list(dict.fromkeys(notes))


def _refuse_folded(checkpoint: Checkpoint, base: FullCheckpoint) -> None:
    """Refuse to compare weights that AWQ quantised with any others of a whole model."""
    if checkpoint.holds_all() and (checkpoint.quantised == "awq") != (base.quantised == "awq"):
        folded = base if base.quantised == "awq" else checkpoint
        raise PairingError(
            f"{folded.path}: AWQ moved scales from one layer's weights into another's, so that "
            "lengths and directions of the model it was made from are lost; compare it with "
            "another model that was quantised with it, or compare the unquantised ones"
        )


def _names_in_base(member: Member, base: FullCheckpoint) -> dict[str, str]:
    """Map the base's name of every module a checkpoint holds to the checkpoint's own."""
    try:
        with blaming(member.checkpoint.path):
            names = member.checkpoint.names_in(base)
    except PairingError as error:
        raise PairingError(f"{member.checkpoint.path} and base {base.path}: {error}") from None
    return {of_base: own for own, of_base in names.items()}


def _select(
    base: FullCheckpoint,
    members: Sequence[Member],
    names: Sequence[dict[str, str]],
    wanted: Sequence[str],
) -> list[Matrix]:
    """Choose the wanted matrices, looking no further than where their names may lie."""
    likely = [module for module in base.modules if may_be_wanted(module, wanted)]
    try:
        return select(_base_matrices(base, members, names, likely), wanted)
    except SelectionError:
        if others := _no_matrices(base, wanted):
            raise SelectionError(
                f"matrices: {', '.join(wanted)}: of the base these are {others}; "
                "magnitude and direction need two dimensions"
            ) from None
        # Only to say what there is instead are the others looked at.
        return select(_base_matrices(base, members, names, base.modules), wanted)


def _no_matrices(base: FullCheckpoint, wanted: Sequence[str]) -> str:
    """Say which tensors the words mean that are no matrices; biases go without saying."""
    likely = [
        name
        for name in base.tensors
        if not name.endswith(".bias") and may_be_wanted(name.removesuffix(".weight"), wanted)
    ]
    shapes = base.tensors.shapes_of(likely)
    others = [f"{n} ({'×'.join(map(str, s))})" for n, s in shapes.items() if not is_matrix(n, s)]
    return f"{len(others)} tensors that are no matrices: {listing(others, 4)}" if others else ""


def _base_matrices(
    base: FullCheckpoint,
    members: Sequence[Member],
    names: Sequence[dict[str, str]],
    modules: Iterable[str],
) -> list[Matrix]:
    """List the base's matrices; whether one is stored transposed an adapter may know."""

    def says_transposed(module: str, stored: tuple[int, int]) -> bool:
        return any(
            module in in_base and member.checkpoint.says_transposed(in_base[module], stored)
            for member, in_base in zip(members, names, strict=True)
        )

    with blaming(base.path):
        shapes = base.tensors.shapes_of(f"{module}.weight" for module in modules)
        return find_matrices(shapes, says_transposed, base.config)


def _problems(
    member: Member, in_base: dict[str, str], base: FullCheckpoint, selected: Sequence[Matrix]
) -> list[str]:
    """Say what of a checkpoint the base lacks, what it lacks itself, what has another shape."""
    checkpoint, problems = member.checkpoint, []
    unknown = [
        module
        for name, module in in_base.items()
        if module in checkpoint.required and name not in base.modules
    ]
    if unknown:
        problems.append(f"changes {listing(unknown, 6)}, which the base does not have")
    missing = [matrix for matrix in selected if matrix.module not in in_base]
    if missing and checkpoint.holds_all():
        problems.append(f"lacks {listing(missing, 6)}, which the base has")
    # What is compared is looked at side by side, where it lies elsewhere.
    checkpoint.tensors.open(
        name
        for m in selected
        if m.module in in_base
        for name in checkpoint.tensors_of(in_base[m.module])
    )
    for matrix in selected:
        if matrix.module in in_base:
            module = in_base[matrix.module]
            shape, expected = checkpoint.stored_shape(module, matrix), matrix.stored_shape
            if shape != expected:
                problems.append(
                    f"{module} is {shape[0]}×{shape[1]}, in the base {expected[0]}×{expected[1]} "
                    "(out×in)"
                )
    return [f"{checkpoint.path}: {problem}" for problem in problems]


def _notes(
    member: Member, in_base: dict[str, str], base: FullCheckpoint, selected: Sequence[Matrix]
) -> list[str]:
    """Say what of the selection an adapter leaves alone, and what of it is not compared."""
    notes, checkpoint = [], member.checkpoint
    untouched = [matrix for matrix in selected if matrix.module not in in_base]
    if untouched and not checkpoint.holds_all():
        labels = sorted({matrix.label for matrix in untouched})
        notes.append(
            f"{member.run}: the adapter leaves {len(untouched)} of the {len(selected)} matrices "
            f"alone ({listing(labels)}); they have no row"
        )
    new = sorted(module for name, module in in_base.items() if name not in base.modules)
    if new:
        notes.append(f"{member.run}: not compared, for the base has none: {listing(new, 4)}")
    if checkpoint.unread:
        notes.append(f"{member.run}: tensors that were not read: {listing(checkpoint.unread, 4)}")
    return notes
