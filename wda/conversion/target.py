"""What a layout can express, and how changes are brought to what it can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from wda.conversion.change import Change, Weight
from wda.conversion.source import Source

Write = Callable[[Path, Sequence[Change], Sequence[Weight], Source], None]


def _anything(_source: Source, _module: str) -> str | None:
    return None


@dataclass(frozen=True)
class Target:
    """A layout that adapters are written in.

    Attributes
    ----------
    files : tuple of str
        Names of the files it is made of.
    write : callable
        Writes them into a folder.
    magnitudes : {"each", "all or none", "all"}
        Which modules have one: each as it likes, all where one has, or all.
    magnitude_alone : bool
        Whether a module may have a magnitude and no factors.
    one_scaling : bool
        Whether all modules have the same rank and the same factor s.
    kernels, weights : bool
        Whether it has convolutions, and modules trained whole.
    missing : callable
        Gives the reason why a module, by the path it is written under, has no place in it.
    computed : torch.dtype
        What computed magnitudes are stored in.
    """

    files: tuple[str, ...]
    write: Write
    magnitudes: Literal["each", "all or none", "all"]
    magnitude_alone: bool = False
    one_scaling: bool = False
    kernels: bool = False
    weights: bool = False
    missing: Callable[[Source, str], str | None] = _anything
    computed: torch.dtype = torch.float64

    def reason(self, source: Source, found: Change | Weight) -> str | None:
        """Tell why a module has no place in it."""
        if isinstance(found, Weight) and not self.weights:
            return "it is trained whole, for which the layout has no place"
        if isinstance(found, Change) and found.kernel and not self.kernels:
            return "it is a convolution, which the layout has none of"
        return self.missing(source, found.module)


def common_scaling(changes: Sequence[Change]) -> float:
    """Give the factor s that most modules have; modules without factors have none to count."""
    counts = Counter(change.scaling for change in changes if change.rank and change.scaling)
    return counts.most_common(1)[0][0] if counts else 1.0


def fitted(target: Target, changes: dict[str, Change], source: Source) -> dict[str, Change]:
    """Bring changes, by the adapter's own names, to what a layout expresses; exactly but for B.

    Where all must have one factor s, B takes up what differs, rounded to its dtype.
    """
    changes = dict(changes)
    alone = {m for m, change in changes.items() if change.rank == 0}
    if not target.magnitude_alone:
        changes = {m: _with_factors(m, c, source) if m in alone else c for m, c in changes.items()}
    if target.one_scaling:
        scaling = common_scaling([c for m, c in changes.items() if m not in alone])
        rank = max(change.rank for change in changes.values())
        changes = {
            m: change if change.rank == 0 else _uniform(change, scaling, rank, m in alone)
            for m, change in changes.items()
        }
    lacking = [m for m, change in changes.items() if change.magnitude is None]
    some = len(lacking) < len(changes)
    if target.magnitudes == "all" or (target.magnitudes == "all or none" and some):
        for m in lacking:
            w0 = source.w0(m, "the magnitude that the layout asks for")
            changes[m] = changes[m].decomposed(w0, target.computed)
    return changes


def _uniform(change: Change, scaling: float, rank: int, alone: bool) -> Change:
    if alone:
        change = replace(change, scaling=scaling)
    elif change.scaling != scaling:
        change = change.rescaled(scaling)
    return change.padded(rank)


def _with_factors(module: str, change: Change, source: Source) -> Change:
    """Give a magnitude factors of zeros, which leave its direction alone."""
    why = "the factors of a magnitude alone"
    out, features = source.matrix(module, why).stored_shape
    zeros = change.B.new_zeros
    kernel = source.kernel(module, why)
    return replace(change, A=zeros(1, features), B=zeros(out, 1), kernel=kernel)
