"""Factors of experts that a model holds stacked in one parameter: ``target_parameters``.

A model's file has a matrix for each expert, named as Mixtral or as Qwen's models do; in memory the
gates and the up-projections of all experts are one parameter and the down-projections another. An
adapter of both has its second pair of factors under ``base_layer``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import ClassVar

from wda.checkpoints.factors import Names
from wda.checkpoints.forms import Factors, Form, Wanted
from wda.checkpoints.found import CONFIG_FILE, Found
from wda.checkpoints.peft.versions import rank_and_alpha
from wda.errors import CheckpointError, listing
from wda.naming import pick
from wda.updates import LowRank

_INNER = ".base_layer"
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True)
class ExpertFactors(Factors):
    """W0 + s·B·A of one expert, whose factors lie among those of all.

    Attributes
    ----------
    A, B : Stored
        The factors of all experts: rows of A by expert and rank, columns of B by rank and expert.
    expert, experts : int
        Which of how many.
    rows : range
        Which of B's rows are this matrix.
    """

    expert: int
    experts: int
    rows: range

    words: ClassVar[str] = "factors of one expert"

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return len(self.rows), self.A.shape[1]

    @property
    def rank(self) -> int:
        """Rank of the expert's factors."""
        return self.A.shape[0] // self.experts

    @property
    def told(self) -> tuple[object, ...]:
        """Which expert and which rows, too."""
        return *super().told, self.expert, self.experts, self.rows

    def update(self, wanted: Wanted) -> LowRank:
        """Give the update of the wanted rows."""
        first = self.expert * self.rank
        a = self.A.read([slice(first, first + self.rank)])
        b = self.B.read()[self.rows.start : self.rows.stop, self.expert :: self.experts]
        return LowRank(a, pick(b, wanted.stored_rows), self.scaling)


def split_experts(
    found: Found, names: Names, scaling: Callable[[int, float], float]
) -> tuple[dict[str, Form], Names]:
    """Give the forms of stacked experts, and the names without theirs.

    Parameters
    ----------
    found : Found
        The adapter.
    names : Names
        Its tensors.
    scaling : callable
        Gives the factor s of a rank and α.
    """
    targets = found.config.get("target_parameters") or ()
    parents = tuple(f".{target.rpartition('.')[0]}" for target in targets)
    stacked = {m for m in names["A"] if f".{m.removesuffix(_INNER)}".endswith(parents)}
    forms: dict[str, Form] = {}
    for module in sorted({m.removesuffix(_INNER) for m in stacked}) if targets else ():
        rank, alpha = rank_and_alpha(found, module)
        pairs = [m for m in (module, module + _INNER) if m in stacked]
        for pair in pairs:
            a, b = names.stored("A", pair), names.stored("B", pair)
            count = a.shape[0] // rank
            if a.shape[0] % rank or b.shape[1] != a.shape[0]:
                raise CheckpointError(
                    f"{found.path}: factors that do not fit {CONFIG_FILE}: {pair} has "
                    f"{a.shape[0]} and {b.shape[1]} ranks, not a multiple of {rank}; weights and "
                    "config must come from one training"
                )
            for label, rows in _matrices(found, names, module, pair, pairs).items():
                for expert in range(count):
                    forms[f"{module}.{expert}.{label}"] = ExpertFactors(
                        a, b, scaling(rank, alpha), expert, count, rows
                    )
    kinds = {
        kind: {m: n for m, n in of.items() if not targets or m not in stacked or kind not in "AB"}
        for kind, of in names.by_kind.items()
    }
    return forms, replace(names, by_kind=kinds)


def _matrices(
    found: Found, names: Names, module: str, pair: str, pairs: Collection[str]
) -> dict[str, range]:
    """Tell which matrices a pair of factors changes, and which rows of B each has."""
    out = names.stored("B", pair).shape[0]
    targets = {t.rpartition(".")[2] for t in found.config["target_parameters"]}
    if not targets <= {"gate_up_proj", "down_proj"}:
        raise CheckpointError(
            f"{found.folder / CONFIG_FILE}: target_parameters {listing(sorted(targets), 4)} of "
            f"{module} are not read; gate_up_proj and down_proj are; merge the adapter with peft "
            "and compare the merged model"
        )
    if len(pairs) == 2:
        other = next(m for m in pairs if m != pair)
        is_down = names.stored("B", other).shape[0] == 2 * names.stored("A", pair).shape[1]
    else:
        is_down = targets == {"down_proj"}
    if is_down:
        return {"down_proj": range(out)}
    return {"gate_proj": range(out // 2), "up_proj": range(out // 2, out)}


def spelled_as(module: str, base_modules: Collection[str]) -> str:
    """Spell an expert's name as the base does, which may be Mixtral's way."""
    expert = re.fullmatch(r"(.*\.)?mlp\.experts\.(\d+)\.(\w+)", module)
    if expert is None or not any(".block_sparse_moe.experts." in name for name in base_modules):
        return module
    parent, number, label = expert.groups(default="")
    return f"{parent}block_sparse_moe.experts.{number}.{_MIXTRAL[label]}"
