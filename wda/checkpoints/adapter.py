"""What adapters of factors have in common: A and B, perhaps a magnitude, for every module.

A layout says how its tensors' names end, and what the scaling is. Shapes are A (rank, in), B (out,
rank), a magnitude of one number per output feature.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from wda.checkpoints.checkpoint import Checkpoint
from wda.checkpoints.tensors import ALL, Tensors
from wda.errors import CheckpointError, listing
from wda.naming import Matrix, pick
from wda.places import Place
from wda.updates import Dense, LowRank, Update, WeightDecomposed

CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class MadeOf:
    """What the update of a module is made of.

    Attributes
    ----------
    update : str
        In words.
    shape : tuple
        (out_features, in_features); None where only the base knows.
    rank : int or None
        Rank of the factors.
    scaling : float or None
        The factor s.
    """

    update: str
    shape: tuple[int | None, int | None]
    rank: int | None = None
    scaling: float | None = None


class Adapter(Checkpoint):
    """An adapter of factors and magnitudes.

    Attributes
    ----------
    endings : mapping
        What a tensor is (``A``, ``B``, ``magnitude``, ``whole`` weight, ``frozen``) → how its name
        ends, after the module's path. The first that fits counts.
    factors_transposed : bool
        Whether the file holds A as (in, rank) and B as (rank, out).
    config : mapping
        What its configuration file says.
    """

    endings: ClassVar[Mapping[str, re.Pattern[str]]]
    factors_transposed: ClassVar[bool] = False

    def __init__(self, path: Place, config: Mapping[str, Any], tensors: Tensors) -> None:
        self.path, self.config, self.tensors = path, config, tensors
        self.base = config.get("base_model_name_or_path") or None
        self._names, self.unread = self._sort()
        self.check()
        self.required = frozenset(self._names["A"]) | frozenset(self._names["magnitude"])
        # "whole" are modules trained whole beside the adapter.
        self.modules = self.required | set(self._names["whole"])

    @abstractmethod
    def scaling(self, module: str) -> float:
        """Give the factor s of a module."""

    def made_of(self, module: str) -> MadeOf:
        """Tell what the update of a module is made of."""
        magnitude = module in self._names["magnitude"]
        if module in self._names["A"]:
            (rank, features), (out, _) = self.shape("A", module), self.shape("B", module)
            update = "factors and magnitude" if magnitude else "factors"
            return MadeOf(update, (out, features), rank, self.scaling(module))
        if magnitude:
            return MadeOf("magnitude alone", (math.prod(self.shape("magnitude", module)), None))
        rows, features = self.shape("whole", module)
        return MadeOf("the weight itself", (rows, features))

    def holds_all(self) -> bool:
        """Tell that an absent matrix is one the adapter leaves alone."""
        return False

    def stored_shape(self, module: str, matrix: Matrix) -> tuple[int, int]:
        """Give the shape of B·A, or of a whole weight beside it."""
        if module in self._names["A"]:
            return self.shape("B", module)[0], self.shape("A", module)[1]
        if module in self.required:
            return math.prod(self.shape("magnitude", module)), matrix.stored_shape[1]
        rows, features = self.shape("whole", module)
        return (features, rows) if matrix.stored_transposed else (rows, features)

    def update(self, module: str, matrix: Matrix, rows: slice | None = None) -> Update:
        """Give W0 + s·B·A, or its weight-decomposed form where there is a magnitude."""
        if module not in self.required:
            name = self._names["whole"][module]
            return Dense(self.tensors.read_matrix(name, matrix, rows))
        some = matrix.rows_of_stored(rows)
        low_rank = self._low_rank(module, matrix, some)
        if module not in self._names["magnitude"]:
            return low_rank
        magnitude = self.tensors.read(self._names["magnitude"][module], again=True)
        return WeightDecomposed(low_rank, pick(magnitude.flatten(), some))

    def _low_rank(self, module: str, matrix: Matrix, some: list[slice]) -> LowRank:
        if module not in self._names["A"]:
            # The magnitude alone is trained: the direction has an update of rank 0.
            dtype = self.tensors.read(self._names["magnitude"][module], again=True).dtype
            vectors = sum(rows.stop - rows.start for rows in some)
            return LowRank(*_empty(vectors, matrix.stored_shape[1], dtype), scaling=0.0)
        # A serves all rows of all parts of a matrix, and is asked for again with each.
        a = self.tensors.read(self._names["A"][module], again=True)
        if self.factors_transposed:
            b = pick(self.tensors.read(self._names["B"][module], again=True).T, some)
            return LowRank(a.T, b, self.scaling(module))
        b = self.tensors.read(self._names["B"][module], rows=some)
        return LowRank(a, b, self.scaling(module))

    def held_bytes(
        self, module: str, matrix: Matrix, rows: slice | None = None, moved: bool = False
    ) -> int:
        """Give the memory of the factors, which are widened to float64."""
        if module not in self._names["A"]:
            return super().held_bytes(module, matrix, rows, moved)
        share = len(range(*(rows or ALL).indices(matrix.shape[0])))
        rank, features = self.shape("A", module)
        return 8 * rank * (features + share)

    def meaning(self, module: str) -> tuple[object, ...] | None:
        """Give the scaling, beside what all layouts tell."""
        stored = super().meaning(module)
        return stored and (*stored, self.scaling(module) if module in self._names["A"] else None)

    def tensors_of(self, module: str) -> tuple[str, ...]:
        """Name the factors and the magnitude, or the whole weight beside the adapter."""
        kinds = ("A", "B", "magnitude") if module in self.required else ("whole",)
        return tuple(self._names[kind][module] for kind in kinds if module in self._names[kind])

    def shape(self, kind: str, module: str) -> tuple[int, ...]:
        """Give the shape of a module's tensor of a kind: A as (rank, in), B as (out, rank)."""
        stored = self.tensors[self._names[kind][module]].shape
        return stored[::-1] if self.factors_transposed and kind in ("A", "B") else stored

    def check(self) -> None:
        """Refuse factors and magnitudes that do not fit each other.

        Raises
        ------
        CheckpointError
            Naming them.
        """
        a, b = set(self._names["A"]), set(self._names["B"])
        if a != b:
            raise CheckpointError(
                f"{self.path}: lora_A and lora_B do not belong together; only one of the two "
                f"exists for {listing(sorted(a ^ b))}"
            )
        if not a and not self._names["magnitude"]:
            ending = self.endings["A"].pattern.strip("$").replace("\\", "").lstrip(".")
            raise CheckpointError(
                f"{self.path}: no tensor ends in {ending}; found {listing(self.tensors, 4)}"
            )
        shapes = {m: (self.shape("A", m), self.shape("B", m)) for m in sorted(a)}
        wrong = [
            f"{module} (A {of_a}, B {of_b})"
            for module, (of_a, of_b) in shapes.items()
            if len(of_a) != 2 or len(of_b) != 2 or of_a[0] != of_b[1]
        ]
        if wrong:
            raise CheckpointError(
                f"{self.path}: factors that do not fit each other: {listing(wrong, 6)}; "
                "all of them must come from one training"
            )
        wrong = [
            f"{module} ({self.shape('magnitude', module)})"
            for module in sorted(set(self._names["magnitude"]) & a)
            if math.prod(self.shape("magnitude", module)) != self.shape("B", module)[0]
        ]
        if wrong:
            raise CheckpointError(
                f"{self.path}: a magnitude needs one number per output feature; wrong for "
                f"{listing(wrong, 6)}"
            )

    def _sort(self) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
        """Sort the tensors: kind → module → tensor name, and the names that fit no kind."""
        names: dict[str, dict[str, str]] = {
            kind: {} for kind in ("A", "B", "magnitude", "whole", *self.endings)
        }
        unread = []
        for name, entry in self.tensors.items():
            kind = next((kind for kind, end in self.endings.items() if end.search(name)), None)
            if kind is None or (kind == "whole" and len(entry.shape) != 2):
                unread.append(name)
            else:
                module = self.endings[kind].sub("", name).removeprefix(PREFIX)
                if kind in ("A", "B", "magnitude") and module in names[kind]:
                    raise CheckpointError(
                        f"{self.path}: holds several adapters of {module} ({names[kind][module]} "
                        f"and {name}); save the one that is meant alone"
                    )
                names[kind][module] = name
        return names, tuple(unread)


def _empty(vectors: int, features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Give A and B of rank 0."""
    return torch.empty(0, features, dtype=dtype), torch.empty(vectors, 0, dtype=dtype)
