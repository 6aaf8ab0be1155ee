"""How far apart the levels of packed numbers are around each: what their rounding could be."""

from __future__ import annotations

import torch
from torch import Tensor

from wda.checkpoints.tensors import ALL, Tensors, laid_flat
from wda.naming import Matrix


def spacings_of(
    tensors: Tensors, name: str, matrix: Matrix, rows: slice | None = None
) -> Tensor | None:
    """Give the spacings of a stored weight as (out_features, in_features), or some rows of that.

    Parameters
    ----------
    tensors : Tensors
        Those of a checkpoint.
    name : str
        The weight's name.
    matrix : Matrix
        How it is stored, and which part of it is wanted.
    rows : slice, optional
        Rows of that part.

    Returns
    -------
    Tensor or None
        None where the numbers are not packed, so that their dtype says it.
    """
    if (spacings := tensors[name].spacings) is None:
        return None
    if matrix.stored_transposed:
        return matrix.take(spacings(ALL))[rows or ALL]
    return laid_flat(torch.cat([spacings(some) for some in matrix.rows_of_stored(rows)]))


def between(levels: Tensor) -> Tensor:
    """Give how far apart each level and its neighbours are, of the two sides the mean that counts.

    A number is rounded to a level from half the way to either neighbour: an error between −a/2 and
    b/2 has the mean square (a³ + b³)/(12·(a + b)).
    """
    ordered, place = torch.unique(levels, return_inverse=True)
    apart = ordered.diff()
    sides = torch.stack([torch.cat([apart[:1], apart]), torch.cat([apart, apart[-1:]])])
    return ((sides**3).sum(dim=0) / sides.sum(dim=0)).sqrt()[place]


def even(values: Tensor, block: int, steps: int, symmetric: bool) -> Tensor:
    """Give the step between even levels around every number, from how far those of a block reach.

    Parameters
    ----------
    values : Tensor
        The numbers, blocks of them along the last dimension.
    block : int
        How many share a scale.
    steps : int
        Steps from the largest to zero, or to the smallest.
    symmetric : bool
        Whether it is to zero.
    """
    blocks = values.reshape(*values.shape[:-1], -1, block)
    reach = blocks.abs().amax(-1) if symmetric else blocks.amax(-1) - blocks.amin(-1)
    return (reach / steps).repeat_interleave(block, dim=-1)
