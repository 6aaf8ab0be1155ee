"""Rows of an embedding that were trained alone: ``trainable_token_indices``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from wda.checkpoints.factors import Names, sort_names
from wda.checkpoints.forms import Form, Stored, Wanted
from wda.checkpoints.found import CONFIG_FILE, Found
from wda.checkpoints.peft.contents import Contents
from wda.errors import CheckpointError
from wda.updates import Computed, Some

ENDING = re.compile(r"(\.token_adapter)?\.trainable_tokens_delta(\.[^.]+)?$")


@dataclass(frozen=True)
class ReplacedRows(Form):
    """W0 with some of its rows replaced.

    Attributes
    ----------
    values : Stored
        The new rows.
    indices : tuple of int
        Which rows of W0 they replace.
    """

    values: Stored
    indices: tuple[int, ...]

    words: ClassVar[str] = "rows of the weight"

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The rows."""
        return (self.values,)

    @property
    def shape(self) -> tuple[None, int]:
        """(None, in_features)."""
        return None, self.values.shape[1]

    @property
    def told(self) -> tuple[object, ...]:
        """Which rows they replace, too."""
        return *super().told, self.indices

    def update(self, wanted: Wanted) -> Computed:
        """Give δ, which is zero in all other rows."""
        if max(self.indices) >= wanted.matrix.stored_shape[0]:
            raise CheckpointError(
                f"{self.values.name}: replaces row {max(self.indices)} of {wanted.matrix}, which "
                f"has {wanted.matrix.stored_shape[0]}; compare with a base that has this token"
            )
        values = self.values.read()
        at = torch.full((wanted.matrix.stored_shape[0],), -1)
        at[list(self.indices)] = torch.arange(len(self.indices))
        place = torch.cat([at[rows] for rows in wanted.stored_rows])

        def form(w0: Tensor, some: Some) -> Tensor:
            replaced, delta = place[some] >= 0, torch.zeros_like(w0)
            delta[replaced] = values[place[some][replaced]].double() - w0[replaced]
            return delta

        return Computed(wanted.shape, values.dtype, form)


def read(found: Found) -> Contents:
    """Read an adapter that is nothing but rows of embeddings."""
    endings = {
        "frozen": re.compile(r"\.(trainable_tokens_original|base_layer)\b.*$"),
        "tokens": ENDING,
    }
    names = sort_names(found.path, found.tensors, endings)
    forms = replaced_rows(names, found.config, "token_indices")
    return Contents(forms, "trainable_tokens", names.frozen)


def replaced_rows(names: Names, config: Mapping[str, Any], field: str) -> dict[str, Form]:
    """Give the forms of the embeddings of which rows were trained.

    Parameters
    ----------
    names : Names
        The adapter's tensors.
    config : mapping
        Its configuration.
    field : str
        Where that has the indices: a list, or one for each embedding.
    """
    forms: dict[str, Form] = {}
    for module in names["tokens"]:
        values, indices = names.stored("tokens", module), _indices(config.get(field), module)
        if len(indices) != values.shape[0]:
            raise CheckpointError(
                f"{names.path}: {values.name} has {values.shape[0]} rows, but {field} in "
                f"{CONFIG_FILE} names {len(indices)} tokens for {module}; weights and config must "
                "come from one training"
            )
        forms[module] = ReplacedRows(values, indices)
    return forms


def _indices(
    said: Sequence[int] | Mapping[str, Sequence[int]] | None, module: str
) -> tuple[int, ...]:
    if isinstance(said, Mapping):
        said = next((of for name, of in said.items() if f".{module}".endswith(f".{name}")), None)
    return tuple(said or ())
