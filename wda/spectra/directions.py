"""The leading directions of Wt against those of W0: intruders, and angles between subspaces."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.linalg
from jaxtyping import Float
from torch import Tensor

# Random directions that are drawn to tell how many of them would count as intruders.
_DRAWS = 2000
_SEED = 0


@dataclass(frozen=True)
class Intruders:
    """Leading directions of Wt that W0 does not know (arXiv 2410.21228).

    Attributes
    ----------
    count : int
        How many of the leading left singular vectors of Wt have a cosine below ε, in absolute
        value, with every one of W0's.
    energy : float or None
        Share of the leading directions' Σσ² that is theirs, 0 to 1; None where Wt is zero.
    """

    count: int
    energy: float | None


def find_intruders(
    left: Float[Tensor, "out k"],
    values: Float[Tensor, k],
    w0_left: Float[Tensor, "out known"],
    epsilon: float,
) -> Intruders:
    """Count the leading directions of Wt that are unlike all of W0's.

    Parameters
    ----------
    left, values : Tensor
        The k leading left singular vectors of Wt, in columns, and their singular values.
    w0_left : Tensor
        The left singular vectors of W0, in columns.
    epsilon : float
        ε, above 0 and at most 1: the cosine from which on two directions count as alike.

    Returns
    -------
    Intruders
        Their number and their share of the energy.
    """
    largest = (w0_left.T @ left).abs().amax(dim=0)
    intruding, energy = largest < epsilon, values.square()
    total = float(energy.sum())
    share = float(energy[intruding].sum()) / total if total > 0 else None
    return Intruders(int(intruding.sum()), share)


@lru_cache(maxsize=64)
def random_cosines(out_features: int, known: int) -> np.ndarray:
    """Draw the largest cosine that a random direction has with any of W0's singular vectors.

    Those are orthonormal, so that in a basis that begins with them the cosines are coordinates of a
    random unit vector: a normal number each, over the length that they and the rest make.

    Parameters
    ----------
    out_features : int
        Dimension of the space.
    known : int
        How many singular vectors there are.

    Returns
    -------
    numpy.ndarray
        One number per drawn direction, 0 to 1; the same ones every time.
    """
    random = np.random.default_rng(_SEED)
    coordinates = random.standard_normal((_DRAWS, known))
    rest = random.chisquare(out_features - known, _DRAWS) if out_features > known else 0.0
    length = np.sqrt((coordinates**2).sum(axis=1) + rest)
    largest: np.ndarray = np.abs(coordinates).max(axis=1) / length
    return largest


def principal_angles(one: Float[Tensor, "out k"], other: Float[Tensor, "out k"]) -> np.ndarray:
    """Give the angles between the subspaces that two sets of directions span.

    Parameters
    ----------
    one, other : Tensor
        Directions, in columns.

    Returns
    -------
    numpy.ndarray
        In degrees, 0 to 90, from the largest down.
    """
    angles: np.ndarray = np.degrees(scipy.linalg.subspace_angles(one.numpy(), other.numpy()))
    return angles
