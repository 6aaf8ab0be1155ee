"""Writing safetensors one tensor at a time, so that a file may be larger than the memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# dtype → its name in the header, and bytes per number.
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class ToWrite:
    """One tensor of a file to be written.

    Attributes
    ----------
    name : str
        Its name.
    shape : tuple of int
        Its shape.
    dtype : torch.dtype
        Its dtype.
    make : callable
        Gives its values when its turn comes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write_safetensors(file: Path, tensors: Iterable[ToWrite]) -> None:
    """Write a safetensors file, holding one tensor at a time.

    Parameters
    ----------
    file : Path
        The file to be written.
    tensors : iterable of ToWrite
        What it is to hold.
    """
    # Large numbers first, so that each begins at a multiple of its size, as readers like it.
    ordered = sorted(tensors, key=lambda one: (-one.dtype.itemsize, one.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for one in ordered:
        end = start + math.prod(one.shape) * one.dtype.itemsize
        header[one.name] = {
            "dtype": _NAMES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for one in ordered:
            values = one.make()
            assert (tuple(values.shape), values.dtype) == (one.shape, one.dtype), one.name
            stream.write(values.contiguous().flatten().view(torch.uint8).numpy().data)
