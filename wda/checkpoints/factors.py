"""Factors and magnitudes by the endings of their tensors' names, as most layouts store them.

A layout says how its names end, and what the scaling is. Shapes are A (rank, in), B (out, rank), a
magnitude of one number per output or per input feature.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from wda.checkpoints.forms import Axis, Decomposed, Factors, Form, Nothing, Stored, Whole
from wda.checkpoints.tensors import Tensors
from wda.errors import CheckpointError, listing
from wda.places import Place

# What a tensor is (A, B, magnitude, whole weight, frozen, …) → how its name ends, after the
# module's path. The first that fits counts.
Endings = Mapping[str, re.Pattern[str]]

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Names:
    """An adapter's tensors, sorted by what they are and by the module they belong to.

    Attributes
    ----------
    path : Place
        Where they lie, for messages.
    tensors : Tensors
        All of them.
    by_kind : mapping
        Kind → module → tensor name.
    frozen : tuple of str
        The names of copies of W0 and the like, that no training changes.
    turned : bool
        Whether the file holds A as (in, rank) and B as (rank, out).
    """

    path: Place
    tensors: Tensors
    by_kind: Mapping[str, Mapping[str, str]]
    frozen: tuple[str, ...]
    turned: bool = False

    def __getitem__(self, kind: str) -> Mapping[str, str]:
        """Give module → tensor name of one kind."""
        return self.by_kind.get(kind, {})

    def stored(self, kind: str, module: str) -> Stored:
        """Give a module's tensor of a kind."""
        turned = self.turned and kind in ("A", "B")
        return Stored(self.tensors, self[kind][module], turned)

    def rank(self, module: str) -> int:
        """Give the rank of a module's factors."""
        return self.stored("A", module).shape[0]

    def forms(
        self,
        scaling: Callable[[str], float],
        axis: Callable[[str], Axis] = lambda _module: "output",
        others: Mapping[str, Form] = MappingProxyType({}),
    ) -> dict[str, Form]:
        """Say which form each module has, after making sure that its tensors fit.

        Parameters
        ----------
        scaling : callable
            Gives the factor s of a module.
        axis : callable
            Gives what the magnitude of a module has one number of.
        others : mapping
            Module → form, where its direction is stored otherwise than as A and B.

        Raises
        ------
        CheckpointError
            When factors or magnitudes do not fit each other.
        """
        self._check()
        directions: dict[str, Form] = {
            m: Factors(self.stored("A", m), self.stored("B", m), scaling(m))
            for m in self["A"]
            if m not in others
        }
        directions |= others
        self._check_magnitudes(directions, axis)
        forms = self.wholes() | directions
        for module in self["magnitude"]:
            magnitude = self.stored("magnitude", module)
            direction = directions.get(module, Nothing(magnitude))
            forms[module] = Decomposed(direction, magnitude, axis(module))
        return forms

    def wholes(self) -> dict[str, Form]:
        """Give the forms of the modules that are trained whole."""
        return {module: Whole(self.stored("whole", module)) for module in self["whole"]}

    def require_pairs(self) -> None:
        """Refuse a factor that lacks the other one.

        Raises
        ------
        CheckpointError
            Naming their modules.
        """
        a, b = set(self["A"]), set(self["B"])
        if a != b:
            raise CheckpointError(
                f"{self.path}: lora_A and lora_B do not belong together; only one of the two "
                f"exists for {listing(sorted(a ^ b))}"
            )

    def require_magnitudes(self, modules: Iterable[str], why: str, way_out: str) -> None:
        """Refuse an adapter that lacks the magnitude of one of these modules.

        Raises
        ------
        CheckpointError
            Naming them.
        """
        missing = sorted(set(modules) - set(self["magnitude"]))
        if missing:
            raise CheckpointError(
                f"{self.path}: {why} for {listing(missing, 6)}; {way_out}; nothing stands in for "
                "them"
            )

    def _check(self) -> None:
        self.require_pairs()
        a = set(self["A"])
        shapes = {m: (self.stored("A", m).shape, self.stored("B", m).shape) for m in sorted(a)}
        wrong = [
            f"{module} (A {of_a}, B {of_b})"
            for module, (of_a, of_b) in shapes.items()
            if of_a[0] != of_b[1]
        ]
        if wrong:
            raise CheckpointError(
                f"{self.path}: factors that do not fit each other: {listing(wrong, 6)}; "
                "all of them must come from one training"
            )

    def _check_magnitudes(
        self, directions: Mapping[str, Form], axis: Callable[[str], Axis]
    ) -> None:
        wrong = []
        for module in sorted(set(self["magnitude"]) & set(directions)):
            count = math.prod(self.stored("magnitude", module).shape)
            features = directions[module].shape[0 if axis(module) == "output" else 1]
            if features is not None and not _fits(count, features, axis(module)):
                wrong.append(f"{module} ({count} numbers for {features} {axis(module)} features)")
        if wrong:
            raise CheckpointError(
                f"{self.path}: a magnitude needs one number per feature of its axis; wrong for "
                f"{listing(wrong, 6)}"
            )


def sort_names(
    path: Place, tensors: Tensors, endings: Endings, prefix: str = PREFIX, turned: bool = False
) -> Names:
    """Sort an adapter's tensors by what they are.

    Parameters
    ----------
    path : Place
        Where they lie, for messages.
    tensors : Tensors
        The tensors.
    endings : mapping
        Kind → how names end. A kind ``whole`` takes matrices only, a kind ``frozen`` what no
        training changes.
    prefix : str
        What stands before the module's path.
    turned : bool
        Whether the file holds A as (in, rank) and B as (rank, out).

    Raises
    ------
    CheckpointError
        When a module has two tensors of one kind, or there is no factor and no magnitude.
    """
    names: dict[str, dict[str, str]] = {kind: {} for kind in endings if kind != "frozen"}
    frozen = []
    for name, entry in tensors.items():
        kind = next((kind for kind, end in endings.items() if end.search(name)), None)
        if kind == "frozen":
            frozen.append(name)
        if kind not in names or (kind == "whole" and len(entry.shape) < 2):
            continue
        module = endings[kind].sub("", name).removeprefix(prefix)
        if module in names[kind]:
            raise CheckpointError(
                f"{path}: holds several adapters of {module} ({names[kind][module]} "
                f"and {name}); save the one that is meant alone"
            )
        names[kind][module] = name
    if not any(of_kind for kind, of_kind in names.items() if kind != "whole"):
        first = endings.get("A") or next(e for k, e in endings.items() if k != "frozen")
        ending = first.pattern.strip("$").replace("\\", "").lstrip(".")
        raise CheckpointError(f"{path}: no tensor ends in {ending}; found {listing(tensors, 4)}")
    return Names(path, tensors, names, tuple(frozen), turned)


def _fits(count: int, features: int, axis: Axis) -> bool:
    # A convolution has one number per input channel, and several features of each.
    return count == features if axis == "output" else count > 0 and features % count == 0
