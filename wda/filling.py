"""What was measured, as rows of tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from wda.changes import head_size
from wda.decomposition import decomposition
from wda.schedule import Measurement


def table_rows(measurement: Measurement) -> Iterator[dict[str, object]]:
    """Give the rows of the table that a measurement fills; columns of :data:`wda.table.COLUMNS`."""
    source, matrix = measurement.source, measurement.matrix
    for change in measurement.changes:
        yield _place(measurement) | {
            "method": source.member.method,
            "rank": source.checkpoint.rank(source.module),
            "layer": matrix.layer,
            "out_features": matrix.shape[0],
            "in_features": matrix.shape[1],
            **change.columns,
        }


def vectors_table(measurements: Iterable[Measurement], config: Mapping[str, Any]) -> pd.DataFrame:
    """Give a table with a row per vector: its norm and how it changed.

    Parameters
    ----------
    measurements : iterable of Measurement
        Those that kept how every vector moved.
    config : mapping
        The base's ``config.json``, which tells the attention heads.

    Returns
    -------
    pandas.DataFrame
        ``magnitude_before`` (m_0), ``magnitude_change`` (m_t − m_0) and ``direction_change``
        (1 − cos) of vector number ``vector``, with run, seed, step, module, layer, matrix, head and
        per as in the table.
    """
    frames = [_vectors(measurement, config) for measurement in measurements]
    return pd.concat(frames, ignore_index=True)


def _vectors(measurement: Measurement, config: Mapping[str, Any]) -> pd.DataFrame:
    move, matrix = measurement.move, measurement.matrix
    assert move is not None
    change = decomposition(move)
    numbers = range(change.n_vectors)
    size = head_size(matrix, config, measurement.per)
    columns: dict[str, Any] = {
        **_place(measurement),
        "layer": matrix.layer,
        "head": None if size is None else [number // size for number in numbers],
        "vector": numbers,
        "magnitude_before": move.norm.numpy(),
        "magnitude_change": change.magnitude_change.numpy(),
        "direction_change": change.direction_change.numpy(),
    }
    frame = pd.DataFrame(columns, columns=_VECTOR_COLUMNS)
    dtypes = dict.fromkeys(("seed", "step", "layer", "head"), "Int64")
    return frame.astype(dtypes)


_VECTOR_COLUMNS = [
    *("run", "seed", "step", "module", "layer", "matrix", "head", "per", "vector"),
    *("magnitude_before", "magnitude_change", "direction_change"),
]


def _place(measurement: Measurement) -> dict[str, object]:
    """Tell which run, checkpoint and matrix a measurement is of."""
    member, matrix = measurement.source.member, measurement.matrix
    return {
        "run": member.run,
        "seed": member.seed,
        "step": member.step,
        "module": matrix.module,
        "matrix": matrix.label,
        "per": measurement.per,
    }
