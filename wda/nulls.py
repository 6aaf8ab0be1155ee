r"""What random updates of the measured size would show: draws of ΔM and ΔD beside every row.

A random update points anywhere. Each draw takes one direction for a matrix of a run, of unit
length, and makes it as long at every checkpoint as the update was that was measured there: an
update that grows, and means nothing.

``isotropic``
    All entries normal. Of such an update each vector sees a normal number along itself and the
    root of a χ² number of in_features − 1 degrees across, so that the norms of W0's vectors are
    all of W0 that is needed.
``rank``
    B·A with normal entries, of the rank of the update that was measured; where no rank bounds
    that, an isotropic one. It takes one product of W0 with the draws' A.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from wda.changes import heads
from wda.checkpoints import FullCheckpoint
from wda.draws import Draws
from wda.kernels import compiled
from wda.rows import Factors, Rows
from wda.schedule import Measurement

Null = Literal["isotropic", "rank"]
NULLS = ("isotropic", "rank")
DRAWS = 200

# Columns that W0 is multiplied with at a time, for random updates of low rank.
_COLUMNS = 512


@dataclass(frozen=True)
class _Directions:
    """Random directions as W0's vectors see them, one line per draw.

    Attributes
    ----------
    norms : numpy.ndarray
        m_0, shape (vectors,).
    along : numpy.ndarray
        u, shape (draws, vectors).
    across : numpy.ndarray
        q, of the same shape.
    """

    norms: np.ndarray
    along: np.ndarray
    across: np.ndarray

    @property
    def length(self) -> np.ndarray:
        """Length of the whole direction, shape (draws,)."""
        return np.asarray(np.sqrt((self.along**2 + self.across**2).sum(axis=1)))

    def flattened(self) -> _Directions:
        """See them from the matrix taken as one vector."""
        norm = np.linalg.norm(self.norms)
        along = self.along @ (self.norms / norm if norm > 0 else self.norms)
        across = np.sqrt(np.maximum(self.length**2 - along**2, 0))
        return _Directions(np.array([norm]), along[:, None], across[:, None])


def draw(
    base: FullCheckpoint,
    measurements: Iterable[Measurement],
    null: Null,
    draws: int = DRAWS,
    seed: int = 0,
    on_group: Callable[[int, int], None] = lambda _done, _total: None,
) -> Draws:
    """Draw what random updates would show in every row that was measured.

    Parameters
    ----------
    base : FullCheckpoint
        The pre-trained model; its weights are read for ``rank`` alone.
    measurements : iterable of Measurement
        What was measured, in the order of the table.
    null : {"isotropic", "rank"}
        Which random updates.
    draws : int
        How many.
    seed : int
        What they start from: with the same, the draws are the same to the last bit.
    on_group : callable, optional
        Called after each matrix of each run, with how many are done and how many there are.

    Returns
    -------
    Draws
        Row by row as the table.
    """
    measured = list(measurements)
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, one in enumerate(measured):
        member = one.source.member
        groups.setdefault((member.run, member.seed, one.matrix, _rank(one, null)), []).append(i)

    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def draw_group(group: Sequence[int]) -> None:
        of_group = [measured[i] for i in group]
        delta_m, delta_d = _draw(base, of_group, _rank(of_group[0], null), draws, seed)
        found.update({i: (delta_m[k], delta_d[k]) for k, i in enumerate(group)})

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for done, _ in enumerate(threads.map(draw_group, groups.values()), start=1):
            on_group(done, len(groups))
    names = [name for one in measured for name in [_name(_rank(one, null))] * len(one.changes)]
    return Draws(
        np.array(names, dtype=str),
        np.concatenate([found[i][0] for i in range(len(measured))]),
        np.concatenate([found[i][1] for i in range(len(measured))]),
    )


def _rank(one: Measurement, null: Null) -> int | None:
    """Give the rank of the random updates; None for isotropic ones."""
    return one.source.checkpoint.rank(one.source.module) if null == "rank" else None


def _name(rank: int | None) -> str:
    return "isotropic" if rank is None else f"rank {rank}"


def _draw(
    base: FullCheckpoint, measured: Sequence[Measurement], rank: int | None, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Give ΔM and ΔD of one matrix of one run, shape (checkpoints, rows of each, draws)."""
    first = measured[0]
    matrix, norms = first.matrix, first.norms.numpy()
    names = f"{first.source.member.run}/{first.source.member.seed}/{matrix}"
    random = np.random.default_rng([seed, zlib.crc32(names.encode())])
    features = matrix.shape[1] if first.per == "output" else matrix.shape[0]
    if rank is None:
        directions = isotropic(norms, features, draws, random)
    else:
        w0 = base.weight(matrix.module, matrix)
        directions = of_rank(w0 if first.per == "output" else w0.T, norms, rank, draws, random)
    length = directions.length
    changes = first.changes
    starts = np.array([0, len(norms)])
    if changes[0].granularity == "matrix":
        directions, starts = directions.flattened(), np.array([0, 1])
    elif changes[0].granularity == "head":
        size = changes[0].n_vectors
        starts = np.array([rows.start for _, rows in heads(len(norms), size)] + [len(norms)])
    sizes = np.array([np.sqrt(sum(c.update_norm**2 for c in one.changes)) for one in measured])
    scales = sizes[:, None] / np.where(length > 0, length, 1.0)
    shape = (len(measured), len(starts) - 1, draws)
    delta_m, delta_d = np.empty(shape), np.empty(shape)
    mean_changes(
        directions.norms, directions.along, directions.across, scales, starts, delta_m, delta_d
    )
    return delta_m, delta_d


def isotropic(
    norms: np.ndarray, features: int, draws: int, random: np.random.Generator
) -> _Directions:
    """Draw directions with normal entries, as vectors of these norms see them.

    Parameters
    ----------
    norms : numpy.ndarray
        m_0, shape (vectors,).
    features : int
        Entries of each vector.
    draws : int
        How many.
    random : numpy.random.Generator
        Where the numbers come from.
    """
    shape = (draws, len(norms))
    along = random.standard_normal(shape)
    across = np.sqrt(random.chisquare(features - 1, shape)) if features > 1 else np.zeros(shape)
    return _Directions(norms, along, across)


def of_rank(
    w0: Tensor, norms: np.ndarray, rank: int, draws: int, random: np.random.Generator
) -> _Directions:
    """Draw directions B·A with normal entries, as the rows of W0 see them.

    Parameters
    ----------
    w0 : Tensor
        W0, its vectors in the rows.
    norms : numpy.ndarray
        m_0 of each of them.
    rank, draws : int
        Columns of B, and how many directions.
    random : numpy.random.Generator
        Where the numbers come from.
    """
    along, across = np.empty((draws, len(w0))), np.empty((draws, len(w0)))
    step = max(1, _COLUMNS // max(1, rank))
    for start in range(0, draws, step):
        some = range(start, min(start + step, draws))
        all_A = [torch.from_numpy(random.standard_normal((rank, w0.shape[1]))) for _ in some]
        factors = Factors(all_A)
        rows = Rows(w0, factors)
        for k, A in zip(some, all_A, strict=True):
            B = torch.from_numpy(random.standard_normal((len(w0), rank)))
            inner = (rows.times(A) * B).sum(dim=1).numpy()
            squared = ((B @ factors.gram(A)) * B).sum(dim=1).numpy()
            along[k] = np.divide(inner, norms, out=np.zeros_like(inner), where=norms > 0)
            across[k] = np.sqrt(np.maximum(squared - along[k] ** 2, 0))
    return _Directions(norms, along, across)


@compiled
def mean_changes(
    norms: Any, along: Any, across: Any, scales: Any, starts: Any, delta_m: Any, delta_d: Any
) -> None:
    """Average the changes of :mod:`wda.decomposition` over groups of vectors, for many moves.

    Parameters
    ----------
    norms : numpy.ndarray
        m_0, shape (vectors,).
    along, across : numpy.ndarray
        u and q of directions, shape (draws, vectors).
    scales : numpy.ndarray
        What each direction is multiplied with, shape (checkpoints, draws).
    starts : numpy.ndarray
        Where each group of vectors begins, and where the last ends; shape (groups + 1,).
    delta_m, delta_d : numpy.ndarray
        Where the means go, shape (checkpoints, groups, draws); NaN without a direction.
    """
    for d in range(along.shape[0]):
        for t in range(scales.shape[0]):
            scale = scales[t, d]
            for group in range(len(starts) - 1):
                magnitude = 0.0
                direction = 0.0
                directed = 0
                for i in range(starts[group], starts[group + 1]):
                    m_0 = norms[i]
                    u = scale * along[d, i]
                    q = scale * across[d, i]
                    ahead = m_0 + u
                    m_t = np.sqrt(ahead * ahead + q * q)
                    if m_t + m_0 > 0:
                        magnitude += abs((u * (2 * m_0 + u) + q * q) / (m_t + m_0))
                    if m_0 > 0 and m_t > 0:
                        directed += 1
                        if ahead >= 0:
                            direction += q * q / (m_t * (m_t + ahead))
                        else:
                            direction += 1 - ahead / m_t
                vectors = starts[group + 1] - starts[group]
                delta_m[t, group, d] = magnitude / vectors
                delta_d[t, group, d] = direction / directed if directed > 0 else np.nan
