"""What is measured of every matrix of a checkpoint, for the checks to judge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.stats import spearmanr
from torch import Tensor

from wda.checkpoints import Checkpoint, FullCheckpoint
from wda.checkpoints.forms import Decomposed
from wda.naming import Matrix
from wda.updates import Update, WeightDecomposed, merged


@dataclass(frozen=True)
class Magnitudes:
    """How the magnitudes of a module lie to the lengths of W0's rows and columns.

    Attributes
    ----------
    moved : float
        The largest |m/‖w_0‖ − 1|.
    deviation : float
        The median of the same.
    along, across, permuted : float or None
        Rank correlation with the lengths of what they should belong to, of the other axis, and of
        query's or key's rows in the order that rotary embeddings in pairs have; None where the
        numbers are not as many, or there are no heads.
    """

    moved: float
    deviation: float
    along: float
    across: float | None = None
    permuted: float | None = None


@dataclass(frozen=True)
class Measures:
    """What was measured of one matrix.

    Attributes
    ----------
    module : str
        Path of its module in the base.
    finite : bool
        Whether all numbers of Wt are.
    relative_update : float
        ‖Wt − W0‖/‖W0‖.
    overlap : float
        ⟨W0, δ⟩/‖δ‖² for the update δ, before a magnitude scales it; about 1 where W0 has it in it
        already.
    chance_overlap : float
        What it would be for a δ that has nothing to do with W0.
    lost : float
        ‖rounding‖/‖δ‖ of Wt in W0's dtype.
    permuted_update : float or None
        ‖Wt − W0‖/‖W0‖ with query's or key's rows of W0 in the other order.
    magnitudes : Magnitudes or None
        Those of a weight-decomposed update.
    """

    module: str
    finite: bool
    relative_update: float
    overlap: float
    chance_overlap: float
    lost: float
    permuted_update: float | None = None
    magnitudes: Magnitudes | None = None


def measure(checkpoint: Checkpoint, module: str, matrix: Matrix, base: FullCheckpoint) -> Measures:
    """Measure one matrix; ``module`` is its name in the checkpoint."""
    stored = base.weight(matrix.module, matrix)
    w0 = stored.double()
    update = checkpoint.update(module, matrix, base)
    wt = merged(update, w0)
    delta = wt - w0
    # What a weight decomposition scales afterwards would hide the update that W0 may hold already.
    step = (
        update.direction.delta(w0, slice(None)) if isinstance(update, WeightDecomposed) else delta
    )
    size, moved, stepped = float(w0.norm()), float(delta.norm()), float(step.norm())
    order = _other_order(matrix, base)
    form = getattr(checkpoint, "forms", {}).get(module)
    return Measures(
        matrix.module,
        bool(torch.isfinite(wt).all()),
        moved / size if size else 0.0,
        float((w0 * step).sum()) / stepped**2 if stepped else 0.0,
        size / stepped / w0.numel() ** 0.5 if stepped else 0.0,
        _rounding(wt, stored.dtype) / moved if moved else 0.0,
        None if order is None else float((wt - w0[order]).norm()) / size,
        _magnitudes(form, update, w0, order) if isinstance(form, Decomposed) else None,
    )


def _rounding(wt: Tensor, dtype: torch.dtype) -> float:
    """Give the length of what rounding to a dtype takes of Wt, or has taken.

    What is stored in that dtype was rounded to the next of numbers a unit in the last place apart,
    which takes a twelfth of the unit's square on average.
    """
    taken = float((wt.to(dtype).double() - wt).norm())
    if taken:
        return taken
    _, exponent = torch.frexp(wt)
    unit = torch.ldexp(torch.full_like(wt, torch.finfo(dtype).eps / 2), exponent)
    return float((unit.square().sum() / 12).sqrt())


def _other_order(matrix: Matrix, base: FullCheckpoint) -> Tensor | None:
    """Give the rows of a query or key in the order of rotary embeddings that pair neighbours."""
    field = {"query": "num_attention_heads", "key": "num_key_value_heads"}.get(matrix.label)
    heads = base.config.get(field or "") or base.config.get("num_attention_heads")
    rows = matrix.shape[0]
    if field is None or not heads or rows % (2 * int(heads)):
        return None
    return torch.arange(rows).view(int(heads), 2, -1).transpose(1, 2).flatten()


def _magnitudes(form: Decomposed, update: Update, w0: Tensor, order: Tensor | None) -> Magnitudes:
    axis = 1 if form.axis == "output" else 0
    m = form.magnitude.read().flatten().double().abs()
    m = m if len(m) == w0.shape[1 - axis] else merged(update, w0).norm(dim=axis)
    along, across = w0.norm(dim=axis), w0.norm(dim=1 - axis)
    away = (m / along.clamp(min=torch.finfo(torch.float64).tiny) - 1).abs()
    return Magnitudes(
        float(away.max()),
        float(away.median()),
        _correlation(m, along),
        _correlation(m, across) if len(across) == len(m) else None,
        None if order is None or axis == 0 else _correlation(m, along[order]),
    )


def _correlation(a: Tensor, b: Tensor) -> float:
    found = float(spearmanr(a.numpy(), b.numpy()).statistic) if len(a) > 2 else 1.0
    return found if found == found else 1.0  # all numbers alike  # noqa: PLR0124
