"""Measures the spectra of every update of every matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from wda.checkpoints import FullCheckpoint
from wda.errors import CheckpointError, SelectionError, blaming
from wda.naming import Matrix
from wda.pairing import Pairing, Source
from wda.spectra.directions import find_intruders, principal_angles, random_cosines
from wda.spectra.frames import PREFIXES, make_summary, make_values
from wda.spectra.spectrum import (
    EXACT_ELEMENTS,
    Spectrum,
    low_rank_singular_values,
    singular_values,
    singular_vectors,
)
from wda.updates import LowRank, Update

_ALL = slice(None)


@dataclass(frozen=True)
class _Measured:
    """W0, Wt and ΔW of one matrix, decomposed."""

    spectra: dict[str, Spectrum]
    w0_left: Tensor
    wt_left: Tensor
    rank_bound: int | None


def measure_spectra(
    base: FullCheckpoint,
    pairings: Sequence[Pairing],
    k: int = 10,
    epsilon: float = 0.5,
    on_part: Callable[[int, int, Matrix], None] = lambda _done, _total, _matrix: None,
    *,
    exact_up_to: int = EXACT_ELEMENTS,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure the singular spectra of W0, Wt and ΔW, one matrix after another.

    Parameters
    ----------
    base : FullCheckpoint
        The pre-trained model.
    pairings : sequence of Pairing
        Its matrices, each with every update of it.
    k : int
        How many leading directions of Wt are compared with W0's; all that are
        computed, where those are fewer.
    epsilon : float
        ε, above 0 and at most 1: a direction is an intruder when its cosine with each of W0's is
        below.
    on_part : callable, optional
        Called after each update, with how many are done, how many there are, and its matrix.
    exact_up_to : int
        Elements up to which a matrix is decomposed whole; of larger ones the leading values are
        computed, by a randomised method.

    Returns
    -------
    values : pandas.DataFrame
        The singular values, from the largest down, in units of the weight; columns in
        :data:`VALUES_COLUMNS`.
    summary : pandas.DataFrame
        What they come to; columns in :data:`COLUMNS`.

    Raises
    ------
    SelectionError
        When k or ε is out of its range.
    CheckpointError
        When base or checkpoint holds NaN or infinite numbers, or a file changed under the work.
    """
    if k < 1 or not 0 < epsilon <= 1:
        raise SelectionError(
            f"spectra: k = {k} and epsilon = {epsilon} were asked for; k is the number of leading "
            "directions, at least 1, and epsilon a cosine above 0 and at most 1"
        )
    total = sum(len(pairing.sources) for pairing in pairings)
    values, summary = list[dict[str, object]](), list[dict[str, object]]()
    for pairing in pairings:
        for source, measured in _measure(base, pairing, exact_up_to):
            whose = _whose(source, pairing.matrix)
            values.extend(_values(whose, measured))
            summary.append(
                whose
                | {"method": source.member.method, **_shape(pairing.matrix)}
                | _summary(measured, k, epsilon)
            )
            on_part(len(summary), total, pairing.matrix)
    return make_values(values), make_summary(summary)


def _measure(
    base: FullCheckpoint, pairing: Pairing, exact_up_to: int
) -> Iterator[tuple[Source, _Measured]]:
    """Decompose W0 once, and then what becomes of it in each of the sources."""
    matrix = pairing.matrix
    with blaming(base.path):
        stored = base.weight(matrix.module, matrix)
        w0 = stored.double()
        _require_finite(w0, base.path, matrix.module)
        w0_spectrum, w0_left = singular_vectors(w0, exact_up_to)
    base.require_unchanged(matrix.module)
    for source in pairing.sources:
        with blaming(source.checkpoint.path):
            update = source.checkpoint.update(source.module, matrix, base)
            delta = update.delta(w0, _ALL)
            _require_finite(delta, source.checkpoint.path, source.module)
            wt_spectrum, wt_left = singular_vectors(w0 + delta, exact_up_to)
            of_update = _of_update(update, delta, exact_up_to)
        source.checkpoint.require_unchanged(source.module)
        spectra = {"update": of_update, "w0": w0_spectrum, "wt": wt_spectrum}
        yield source, _Measured(spectra, w0_left, wt_left, _rank_bound(update))


def _of_update(update: Update, delta: Tensor, exact_up_to: int) -> Spectrum:
    if isinstance(update, LowRank):
        return low_rank_singular_values(update)
    return singular_values(delta, exact_up_to)


def _rank_bound(update: Update) -> int | None:
    """Give the rank that an update cannot exceed; one that is scaled by rows has no such bound."""
    return min(len(update.A), *update.shape) if isinstance(update, LowRank) else None


def _require_finite(numbers: Tensor, path: object, module: str) -> None:
    if not numbers.isfinite().all():
        raise CheckpointError(
            f"{path}: {module} holds NaN or Inf, of which there are no spectra; leave this "
            "checkpoint out, or download the base again"
        )


def _whose(source: Source, matrix: Matrix) -> dict[str, Any]:
    member = source.member
    return {
        "run": member.run,
        "seed": member.seed,
        "step": member.step,
        "module": matrix.module,
        "layer": matrix.layer,
        "matrix": matrix.label,
    }


def _shape(matrix: Matrix) -> dict[str, int]:
    return {"out_features": matrix.shape[0], "in_features": matrix.shape[1]}


def _values(whose: dict[str, Any], measured: _Measured) -> Iterator[dict[str, object]]:
    for of, spectrum in measured.spectra.items():
        values = spectrum.values.numpy()
        yield whose | {"of": of, "index": np.arange(len(values)), "singular_value": values}


def _summary(measured: _Measured, k: int, epsilon: float) -> dict[str, object]:
    k = min(k, measured.wt_left.shape[1])
    spectra, wt = measured.spectra, measured.wt_left[:, :k]
    intruders = find_intruders(wt, spectra["wt"].values[:k], measured.w0_left, epsilon)
    random = random_cosines(*measured.w0_left.shape)
    angles = principal_angles(measured.w0_left[:, :k], wt)
    errors = [s.error for s in spectra.values() if s.error is not None]
    row: dict[str, object] = {
        "rank_bound": measured.rank_bound,
        "k": k,
        "epsilon": epsilon,
        "intruders": intruders.count,
        "intruder_energy": intruders.energy,
        "random_intruders": k * float((random < epsilon).mean()),
        "random_cosine": float(np.median(random)),
        "w0_vectors": measured.w0_left.shape[1],
        "principal_angle_mean": float(angles.mean()),
        "principal_angle_max": float(angles.max()),
        "error": max(errors, default=None),
    }
    for of, prefix in PREFIXES.items():
        row |= {f"{prefix}{name}": number for name, number in _numbers(spectra[of]).items()}
    return row


def _numbers(spectrum: Spectrum) -> dict[str, float | None]:
    return {
        "effective_rank": spectrum.effective_rank,
        "entropy": spectrum.entropy,
        "stable_rank": spectrum.stable_rank,
        "rank_90": spectrum.rank_for(0.9),
    }
