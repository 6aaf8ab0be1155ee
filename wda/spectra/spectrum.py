"""The singular values of one matrix, and what they say of its rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wda.updates import LowRank

# Up to so many elements a matrix is decomposed exactly: 4096×4096, 45 seconds of one core.
EXACT_ELEMENTS = 1 << 24

# Of a larger matrix so many leading singular values and vectors are computed, by a randomised
# method that starts from a few vectors more and from this seed.
LEADING = 64
_MORE = 16
_ITERATIONS = 8
SEED = 0


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix, all of them or the leading ones.

    Attributes
    ----------
    values : Tensor
        σ, from the largest down, in the units of the weight; float64.
    energy : float
        ‖·‖_F², the sum of the squares of all singular values, also of those not computed.
    whole : bool
        Whether these are all that can differ from 0.
    error : float or None
        Next to each of the values lies one of the matrix, no further away than this share of the
        largest; None where nothing but float64's rounding stands between them.
    """

    values: Float[Tensor, values]
    energy: float
    whole: bool = True
    error: float | None = None

    @property
    def entropy(self) -> float | None:
        """−Σ p·ln p of the shares p = σ/Σσ; None of zero, or where values are missing."""
        total = float(self.values.sum())
        if not self.whole or total == 0:
            return None
        return float(torch.special.entr(self.values / total).sum())

    @property
    def effective_rank(self) -> float | None:
        """Effective rank exp(entropy), from 1 to the rank (Roy and Vetterli, EUSIPCO 2007)."""
        entropy = self.entropy
        return None if entropy is None else math.exp(entropy)

    @property
    def stable_rank(self) -> float | None:
        """‖·‖_F²/σ_1², from 1 to the rank; None of zero."""
        largest = float(self.values[0])
        return self.energy / largest**2 if largest > 0 else None

    def rank_for(self, share: float) -> int | None:
        """Tell how many leading values hold a share of the energy; None where too few are known."""
        enough = self.values.square().cumsum(0) >= share * self.energy
        if self.energy == 0 or not bool(enough.any()):
            return None
        return int(enough.to(torch.uint8).argmax()) + 1


def singular_values(
    matrix: Float[Tensor, "out features"], exact_up_to: int = EXACT_ELEMENTS
) -> Spectrum:
    """Give the singular values of a matrix in float64, the leading ones where it is large."""
    if matrix.numel() > exact_up_to:
        return singular_vectors(matrix, exact_up_to)[0]
    return Spectrum(torch.linalg.svdvals(matrix), _energy(matrix))


def singular_vectors(
    matrix: Float[Tensor, "out features"], exact_up_to: int = EXACT_ELEMENTS
) -> tuple[Spectrum, Float[Tensor, "out values"]]:
    """Give the singular values of a matrix in float64, and its left singular vectors.

    Parameters
    ----------
    matrix : Tensor
        The matrix, in float64.
    exact_up_to : int
        A matrix of more elements is decomposed by randomised subspace iteration (Halko, Martinsson
        and Tropp, SIAM Review 2011), which gives the leading values alone.

    Returns
    -------
    spectrum : Spectrum
        The values.
    left : Tensor
        One unit vector per value, in columns.
    """
    if matrix.numel() <= exact_up_to:
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        return Spectrum(values, _energy(matrix)), left
    count = min(LEADING, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        size = min(count + _MORE, *matrix.shape)
        left, values, right = torch.svd_lowrank(matrix, q=size, niter=_ITERATIONS)
    left, values, right = left[:, :count], values[:count], right[:, :count]
    error = _residual(matrix, left, values, right) / max(float(values[0]), 1e-300)
    return Spectrum(values, _energy(matrix), whole=False, error=error), left


def low_rank_singular_values(update: LowRank) -> Spectrum:
    """Give the singular values of s·B·A from the triangles of its factors, without the product.

    With B = Q·R and Aᵀ = P·S they are those of s·R·Sᵀ, which has the update's rank as its size.
    """
    _, of_b = torch.linalg.qr(update.B.double(), mode="r")
    _, of_a = torch.linalg.qr(update.A.T.double(), mode="r")
    core = update.scaling * (of_b @ of_a.T)
    return Spectrum(torch.linalg.svdvals(core), _energy(core))


def _energy(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix)) ** 2


def _residual(matrix: Tensor, left: Tensor, values: Tensor, right: Tensor) -> float:
    """Bound how far approximate singular values lie from true ones, by what is left over.

    In [[0, W], [Wᵀ, 0]], whose eigenvalues are ±σ, the vectors [u; v]/√2 leave this residual, and
    as many eigenvalues lie within its norm of the values (Kahan; Parlett, The Symmetric Eigenvalue
    Problem, theorem 11.5.1).
    """
    over = torch.cat([matrix @ right - left * values, matrix.T @ left - right * values])
    return float(torch.linalg.matrix_norm(over, 2)) / math.sqrt(2)
