"""Safetensors files that lie elsewhere: the header first, then the bytes of single tensors."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from wda.checkpoints.entry import Entry, WeightFile, state_of
from wda.errors import CheckpointError
from wda.remote import RemotePlace

_LENGTH = 8  # bytes before the header that tell its length, little-endian
_LONGEST = 100_000_000  # the format's own limit

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def open_remote_safetensors(place: RemotePlace) -> WeightFile:
    """Read the header of a safetensors file that lies elsewhere.

    Raises
    ------
    CheckpointError
        When the file is truncated or is no safetensors file.
    """
    size = place.stat().st_size
    if size < _LENGTH:
        _damaged(place, size, "too short for a header")
    length = int.from_bytes(place.read(0, _LENGTH), "little")
    start = _LENGTH + length
    if length > _LONGEST or start > size:
        _damaged(place, size, f"a header of {length} bytes does not fit")
    try:
        header = json.loads(place.read(_LENGTH, start))
        metadata = header.pop("__metadata__", None) or {}
        entries = {name: _entry(place, start, item) for name, item in header.items()}
        end = max((item["data_offsets"][1] for item in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        _damaged(place, size, "the header is no JSON of named tensors")
    if start + end != size:
        _damaged(place, size, f"the header tells of {start + end} bytes")
    return WeightFile(place, entries, start, state_of(place), metadata)


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Give how many bytes a tensor takes; 0 where the type is not one that is read."""
    return math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else 0


def _entry(place: RemotePlace, data: int, item: dict[str, Any]) -> Entry:
    first, last = item["data_offsets"]
    shape, dtype = tuple(map(int, item["shape"])), str(item["dtype"])
    if dtype in DTYPES and last - first != nbytes_of(dtype, shape):
        raise ValueError
    read = partial(_read, place, data + first, data + last, dtype, shape)
    return Entry(shape, place, read, last - first, f"{dtype} {first}")


def _read(
    place: RemotePlace, start: int, stop: int, dtype: str, shape: tuple[int, ...], rows: slice
) -> Tensor:
    """Fetch some rows; of a tensor that has none, all of it."""
    if dtype not in DTYPES:
        raise CheckpointError(f"{place}: numbers of type {dtype} are not read; convert them")
    if start == stop:
        return torch.empty(shape, dtype=DTYPES[dtype])[rows]
    if shape:
        first, last, _ = rows.indices(shape[0])
        size = (stop - start) // shape[0]
        start, stop, shape = start + first * size, start + last * size, (last - first, *shape[1:])
    return torch.frombuffer(place.read(start, stop), dtype=DTYPES[dtype]).reshape(shape)


def _damaged(place: RemotePlace, size: int, why: str) -> NoReturn:
    raise CheckpointError(
        f"{place}: cannot be read, truncated or corrupt ({size} bytes): {why}; upload it again"
    )
