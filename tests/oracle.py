"""ΔM and ΔD with 50 digits, written from the definitions alone, sharing no line with wda."""

from __future__ import annotations

import mpmath as mp
import torch

mp.mp.dps = 50


def vectors(weight: torch.Tensor, per: str) -> list[list[mp.mpf]]:
    rows = weight if per == "output" else weight.T
    return [[mp.mpf(float(x)) for x in row] for row in rows]


def norm(v: list[mp.mpf]) -> mp.mpf:
    return mp.sqrt(mp.fsum(x * x for x in v))


def changes(
    w0: list[list[mp.mpf]], wt: list[list[mp.mpf]]
) -> tuple[list[mp.mpf], list[mp.mpf | None]]:
    """Signed change of magnitude and 1 − cos of every vector; None where a vector is zero."""
    magnitude = [norm(b) - norm(a) for a, b in zip(w0, wt, strict=True)]
    direction = []
    for a, b in zip(w0, wt, strict=True):
        m0, mt = norm(a), norm(b)
        dot = mp.fsum(x * y for x, y in zip(a, b, strict=True))
        direction.append(None if m0 == 0 or mt == 0 else 1 - dot / (m0 * mt))
    return magnitude, direction


def deltas(w0: list[list[mp.mpf]], wt: list[list[mp.mpf]]) -> tuple[float, float]:
    """ΔM and ΔD."""
    magnitude, direction = changes(w0, wt)
    known = [d for d in direction if d is not None]
    delta_m = mp.fsum(abs(m) for m in magnitude) / len(magnitude)
    return float(delta_m), float(mp.fsum(known) / len(known))


def low_rank_weight(
    w0: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> list[list[mp.mpf]]:
    """W0 + s·B·A with 50 digits, as rows."""
    s = mp.mpf(scaling)
    rank = a.shape[0]
    a_rows = [[mp.mpf(float(x)) for x in row] for row in a]
    return [
        [
            mp.mpf(float(w))
            + s * mp.fsum(mp.mpf(float(b_row[r])) * a_rows[r][j] for r in range(rank))
            for j, w in enumerate(row)
        ]
        for row, b_row in zip(w0, b, strict=True)
    ]


def weight_decomposed(v: list[list[mp.mpf]], magnitude: torch.Tensor) -> list[list[mp.mpf]]:
    """m ⊙ V/‖V‖ with 50 digits, as rows."""
    return [
        [mp.mpf(float(m)) * x / norm(row) for x in row] for row, m in zip(v, magnitude, strict=True)
    ]


def transposed(rows: list[list[mp.mpf]]) -> list[list[mp.mpf]]:
    return [list(column) for column in zip(*rows, strict=True)]
