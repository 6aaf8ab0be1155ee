"""The change of one matrix in the numbers of a table's rows, for what counts as a vector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wda.decomposition import Displacement, Per, decomposition
from wda.floors import TIMES, Rounding, floor_delta_d, floor_delta_m
from wda.naming import Matrix
from wda.table import QUANTILES

Granularity = Literal["vector", "head", "matrix"]
GRANULARITIES = ("vector", "head", "matrix")

# What configurations call the number of attention heads, of queries and of keys and values.
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", *_HEADS)


@dataclass(frozen=True)
class Vectors:
    """What counts as a vector, and what has a row.

    Attributes
    ----------
    per : {"output", "input"}
        Which axis the vectors are.
    granularity : {"vector", "head", "matrix"}
        One row for all vectors of a matrix; one for those of each attention head; or one for the
        matrix taken as a single vector.
    """

    per: Per
    granularity: Granularity = "vector"


@dataclass(frozen=True)
class Change:
    """The numbers of one row: how far some vectors moved.

    Attributes are named as the columns of :data:`wda.table.COLUMNS` that they fill; ``quantiles``
    fills those of the quantiles.
    """

    head: int | None
    granularity: str
    n_vectors: int
    delta_m: float
    delta_d: float
    delta_m_signed: float
    delta_m_relative: float
    update_norm: float
    relative_update: float
    share_grown: float
    quantiles: dict[str, float]
    floor_delta_m: float
    floor_delta_d: float
    n_undirected: int
    dtype: str
    base_dtype: str

    @property
    def columns(self) -> dict[str, object]:
        """What it fills of a table's row."""
        numbers: dict[str, object] = asdict(self)
        del numbers["quantiles"]
        below = self.delta_m < TIMES * self.floor_delta_m
        below |= self.delta_d < TIMES * self.floor_delta_d
        return numbers | self.quantiles | {"below_floor": below}


@dataclass(frozen=True)
class Moved:
    """What one update did to vectors.

    Attributes
    ----------
    dtype, base_dtype : str
        The dtypes of the numbers, of the checkpoint and of W0.
    move : Displacement
        One entry per vector.
    rounding : Rounding
        What rounding alone would have done to them.
    """

    dtype: str
    base_dtype: str
    move: Displacement
    rounding: Rounding


def changes(moved: Moved, granularity: Granularity, head_size: int | None) -> list[Change]:
    """Turn the moves of all vectors of a matrix into the numbers of its rows.

    Parameters
    ----------
    moved : Moved
        One entry per vector of the matrix.
    granularity : {"vector", "head", "matrix"}
        What has a row.
    head_size : int or None
        How many vectors an attention head has; None where the vectors are of no heads, which have
        one row whatever was asked for.
    """
    if granularity == "matrix":
        move, rounding = flattened(moved.move, moved.rounding)
        return [_change(moved, move, rounding, None, "matrix")]
    if granularity == "vector" or head_size is None:
        return [_change(moved, moved.move, moved.rounding, None, "vector")]
    return [
        _change(moved, moved.move.of(rows), moved.rounding.of(rows), head, "head")
        for head, rows in heads(len(moved.move.norm), head_size)
    ]


def heads(n_vectors: int, head_size: int) -> Iterator[tuple[int, slice]]:
    """Give the number of every attention head, and which vectors are its own."""
    for head, start in enumerate(range(0, n_vectors, head_size)):
        yield head, slice(start, start + head_size)


def flattened(move: Displacement, rounding: Rounding) -> tuple[Displacement, Rounding]:
    """Lay all vectors one behind the other, into a single one."""
    norm = torch.linalg.vector_norm(move.norm)
    unit = move.norm / torch.where(norm > 0, norm, 1.0)
    along = (unit * move.along).sum()
    # What went along each vector goes partly across the long one.
    rest = torch.linalg.vector_norm(move.along - along * unit)
    across = torch.hypot(rest, torch.linalg.vector_norm(move.across))
    error_along = (unit.square() * rounding.along).sum()
    error_across = (rounding.along + rounding.across).sum() - error_along
    return (
        Displacement(norm[None], along[None], across[None]),
        Rounding(error_along[None], error_across[None]),
    )


def head_size(matrix: Matrix, config: Mapping[str, Any], per: Per) -> int | None:
    """Tell how many vectors of a matrix belong to one attention head.

    Parameters
    ----------
    matrix : Matrix
        Queries, keys and values have heads along their output features, the output projection
        along its input features; nothing else has.
    config : mapping
        The base's ``config.json``.
    per : {"output", "input"}
        Which axis the vectors are.

    Returns
    -------
    int or None
        None where the vectors are of no heads, or no configuration tells how many there are.
    """
    names = {"query": _HEADS, "key": _KEY_HEADS, "value": _KEY_HEADS, "output": _HEADS}
    if matrix.label not in names or (matrix.label == "output") != (per == "input"):
        return None
    inner = config.get("text_config")
    told = {**config, **(inner if isinstance(inner, dict) else {})}
    count = next((told[name] for name in names[matrix.label] if told.get(name)), None)
    vectors = matrix.shape[0 if per == "output" else 1]
    return vectors // count if isinstance(count, int) and vectors % count == 0 else None


def _change(
    moved: Moved, move: Displacement, rounding: Rounding, head: int | None, granularity: str
) -> Change:
    change = decomposition(move)
    grown, turned = change.magnitude_change, change.direction_change
    started = move.norm > 0
    relative = torch.where(started, grown.abs() / move.norm, torch.nan).nanmean()
    update_norm = torch.linalg.vector_norm(torch.hypot(move.along, move.across))
    base_norm = torch.linalg.vector_norm(move.norm)
    return Change(
        head=head,
        granularity=granularity,
        n_vectors=change.n_vectors,
        delta_m=change.delta_m,
        delta_d=change.delta_d,
        delta_m_signed=float(grown.mean()),
        delta_m_relative=float(relative),
        update_norm=float(update_norm),
        relative_update=float(update_norm / base_norm),
        share_grown=float((grown > 0).double().mean()),
        quantiles=_quantiles("magnitude", grown) | _quantiles("direction", turned),
        floor_delta_m=floor_delta_m(rounding),
        floor_delta_d=floor_delta_d(move.norm, rounding),
        n_undirected=change.n_undirected,
        dtype=moved.dtype,
        base_dtype=moved.base_dtype,
    )


def _quantiles(of: str, values: Float[Tensor, vectors]) -> dict[str, float]:
    """Give quantiles of those that are known, interpolated between neighbours."""
    known = values[~values.isnan()].numpy()
    found = np.percentile(known, QUANTILES) if known.size else np.full(len(QUANTILES), np.nan)
    return {f"{of}_q{q:02}": float(value) for q, value in zip(QUANTILES, found, strict=True)}
