r"""Magnitude and direction: the only home of the formulas for ΔM and ΔD.

Everything here works on the rows of a matrix: one row is one vector. A weight is stored as
(out_features, in_features), so its rows are the paper's "columns" (``per="output"``); for
``per="input"`` the matrix is transposed first, and nothing below changes.

A vector w_0 moves to w_t = w_0 + δ. Seen from w_0, the move has a part along it and a part across
it,

    u = ⟨w_0, δ⟩ / m_0,        q = ‖δ − u·w_0/m_0‖,        m_0 = ‖w_0‖,

and these three numbers say everything that magnitude and direction can:

    m_t       = √((m_0 + u)² + q²)                      the new magnitude
    m_t − m_0 = (u·(2m_0 + u) + q²) / (m_t + m_0)       the change of magnitude
    1 − cos   = q² / (m_t·(m_t + m_0 + u))              the change of direction, for m_0 + u ≥ 0

No line subtracts two nearly equal numbers, so an update of relative size 1e-6 keeps its digits,
and 1 − cos cannot become negative. With a = m_0², c = m_0·u and g = u² + q² = ‖δ‖² these are the
familiar m_t² = a + 2c + g and ‖δ‖² = (m_t − m_0)² + 2·m_0·m_t·(1 − cos).

Source: DoRA, arXiv 2402.09353, Eq. 2 to 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Per = Literal["output", "input"]


@dataclass(frozen=True)
class Displacement:
    """How each vector moved, seen from where it started.

    Attributes
    ----------
    norm : Tensor
        m_0, the norm of each starting vector; shape (vectors,), float64, ≥ 0.
    along : Tensor
        u, the signed length of the move along the starting vector.
    across : Tensor
        q ≥ 0, the length of the move at right angles to it.
    """

    norm: Float[Tensor, vectors]
    along: Float[Tensor, vectors]
    across: Float[Tensor, vectors]

    @property
    def final_norm(self) -> Float[Tensor, vectors]:
        """The norm m_t of each moved vector."""
        return torch.hypot(self.norm + self.along, self.across)

    def of(self, rows: slice) -> Displacement:
        """Give those of some vectors."""
        return Displacement(self.norm[rows], self.along[rows], self.across[rows])

    def cpu(self) -> Displacement:
        """Give the same on the processor, where a device computed it."""
        return Displacement(self.norm.cpu(), self.along.cpu(), self.across.cpu())


def displacement(
    w0: Float[Tensor, "vectors features"], delta: Float[Tensor, "vectors features"]
) -> Displacement:
    """Split the move ``delta`` of every row of ``w0`` into its part along and across that row.

    A row of ``w0`` that is zero has no direction to move along: its move counts as across. A row
    that ends at zero moved back along itself, by its norm exactly.

    Parameters
    ----------
    w0 : Tensor
        Starting vectors in float64, one per row.
    delta : Tensor
        What is added to them, in float64.

    Returns
    -------
    Displacement
        One entry per row.
    """
    start, start_scale = _scaled(w0)
    change, change_scale = _scaled(delta)
    norm = torch.linalg.vector_norm(start, dim=1)
    unit = start / torch.where(norm > 0, norm, 1.0)[:, None]
    along = (unit * change).sum(dim=1)
    across = torch.linalg.vector_norm(change - along[:, None] * unit, dim=1)
    move = Displacement(start_scale * norm, change_scale * along, change_scale * across)
    # To the last bit, for rounding would leave a length that seems to have a direction.
    ended = ((w0 + delta) == 0).all(dim=1)
    return Displacement(
        move.norm,
        torch.where(ended, -move.norm, move.along),
        torch.where(ended, 0.0, move.across),
    )


def _scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Bring each row near 1 by a power of two, so that no square leaves float64's range."""
    largest = rows.abs().amax(dim=1)
    usable = (largest > 0) & largest.isfinite()
    # Half of float64's range is as far as one factor reaches; what is left is harmless.
    exponent = torch.frexp(torch.where(usable, largest, 1.0)).exponent.clamp(-1000, 1000)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return rows / scale[:, None], scale


def join(parts: Sequence[Displacement]) -> Displacement:
    """Put the displacements of consecutive blocks of vectors into one."""
    return Displacement(
        torch.cat([part.norm for part in parts]),
        torch.cat([part.along for part in parts]),
        torch.cat([part.across for part in parts]),
    )


def magnitude_change(move: Displacement) -> Float[Tensor, vectors]:
    """Give the signed change of magnitude, m_t − m_0, of every vector."""
    m_0, u, q = move.norm, move.along, move.across
    both = move.final_norm + m_0
    both = torch.where(both > 0, both, 1.0)
    # Divided before multiplied, for numbers whose squares float64 cannot hold.
    return u / both * (2 * m_0 + u) + q / both * q


def direction_change(move: Displacement) -> Float[Tensor, vectors]:
    """Give 1 − cos(w_t, w_0) of every vector, in [0, 2]; NaN where w_0 or w_t is zero."""
    ahead, m_t = move.norm + move.along, move.final_norm
    small_angle = move.across / m_t * (move.across / (m_t + ahead))
    change = torch.where(ahead >= 0, small_angle, 1 - ahead / m_t)
    return torch.where((move.norm > 0) & (m_t > 0), change, torch.nan)


@dataclass(frozen=True)
class Decomposition:
    """The change of one weight matrix, vector by vector.

    Attributes
    ----------
    magnitude_change : Tensor
        m_t − m_0 of every vector, signed, in the units of the weight; shape (vectors,), float64.
    direction_change : Tensor
        1 − cos(w_t, w_0) of every vector, from 0 (same direction) to 2 (reversed); NaN for a
        vector that has no direction because it is zero before or after.
    """

    magnitude_change: Float[Tensor, vectors]
    direction_change: Float[Tensor, vectors]

    @property
    def delta_m(self) -> float:
        """ΔM, Eq. 3: the mean of the absolute changes of magnitude, in the units of the weight."""
        return float(self.magnitude_change.abs().mean())

    @property
    def delta_d(self) -> float:
        """ΔD, Eq. 4: the mean of 1 − cos over the vectors that have a direction; NaN if none."""
        return float(self.direction_change.nanmean())

    @property
    def n_vectors(self) -> int:
        """How many vectors the matrix has."""
        return self.magnitude_change.numel()

    @property
    def n_undirected(self) -> int:
        """How many of them are zero before or after, and so are left out of ΔD."""
        return int(self.direction_change.isnan().sum())


def decomposition(move: Displacement) -> Decomposition:
    """Turn a displacement into changes of magnitude and direction."""
    return Decomposition(magnitude_change(move), direction_change(move))


def decompose(w0: Tensor, wt: Tensor, per: Per = "output") -> Decomposition:
    """Decompose the change from ``w0`` to ``wt`` into magnitude and direction.

    Parameters
    ----------
    w0, wt : Tensor
        The weight before and after, of one shape (out_features, in_features), in any floating
        dtype; the arithmetic is float64.
    per : {"output", "input"}
        One vector per output feature (a row of ``nn.Linear.weight``; the paper's choice) or one
        per input feature.

    Returns
    -------
    Decomposition
        ``.delta_m`` and ``.delta_d`` are the paper's ΔM and ΔD; the changes of the single vectors
        are beside them.

    Raises
    ------
    ValueError
        When the two are not matrices of one shape, or ``per`` is neither word.

    Examples
    --------
    The first row doubles its length, the second turns by a right angle:

    >>> import torch
    >>> w0 = torch.tensor([[3.0, 4.0, 0.0], [1.0, 0.0, 0.0]])
    >>> wt = torch.tensor([[6.0, 8.0, 0.0], [0.0, 1.0, 0.0]])
    >>> d = decompose(w0, wt)
    >>> d.magnitude_change.tolist(), d.direction_change.tolist()
    ([5.0, 0.0], [0.0, 1.0])
    >>> d.delta_m, d.delta_d
    (2.5, 0.5)
    """
    if w0.ndim != 2 or w0.shape != wt.shape:
        raise ValueError(
            f"decompose() needs two matrices of one shape (out_features, in_features), "
            f"got {tuple(w0.shape)} and {tuple(wt.shape)}"
        )
    check_per(per)
    if per == "input":
        w0, wt = w0.T, wt.T
    start = w0.double()
    return decomposition(displacement(start, wt.double() - start))


def check_per(per: str) -> None:
    """Raise ``ValueError`` unless ``per`` is one of the two words."""
    if per not in ("output", "input"):
        raise ValueError(f'per must be "output" or "input", got {per!r}')
