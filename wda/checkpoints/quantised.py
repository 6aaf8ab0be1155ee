"""Weights that are stored as packed numbers and scales, read as the floating-point ones they mean.

What a scheme calls its parts tells which it is; ``config.json`` is asked only for what shapes do
not tell. Each gives ``….weight`` as (out_features, in_features) in float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wda.checkpoints.entry import Derived, Entry
from wda.checkpoints.levels import between
from wda.checkpoints.tensors import ALL, Tensors
from wda.errors import CheckpointError
from wda.places import Place
from wda.rows import spacing

Values = Callable[[slice], Tensor]
_Read = tuple[tuple[int, ...], Values, Values]  # shape, values, and how far apart their levels are

# Schemes that are not read, and the part each is told by.
_OTHERS = {
    "_proj_blocks": "MXFP4",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    ".weight_global_scale": "NVFP4",
    ".weight_scales": "EETQ",
    ".weight_zero_point": "compressed-tensors with zero points",
}
_UNPACK = "write the weights themselves with its own library, and give those"

# AWQ deals eight numbers out to a word of 32 bits in this order.
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True)
class _Module:
    """A module of packed parts.

    Attributes
    ----------
    path : str
        Its path.
    config : callable
        Gives what ``config.json`` says of the quantisation; empty where it says nothing.
    source : Place
        The checkpoint, for messages.
    """

    path: str
    config: Callable[[], Mapping[str, Any]]
    source: Place

    def setting(self, name: str) -> Any:
        """Give a setting of its quantisation, the module's own where it has some.

        Raises
        ------
        CheckpointError
            When it is not told.
        """
        config = self.config()
        own = config.get(self.path)
        value = {**config, **(own if isinstance(own, dict) else {})}.get(name)
        if value is None:
            raise CheckpointError(
                f"{self.source}: the weights are packed, and {name} in the quantization of "
                f"config.json, which {self.path} needs, is not told; copy config.json beside them"
            )
        return value


def dequantised(
    tensors: Tensors, config: Callable[[], Mapping[str, Any]], source: Place
) -> tuple[Tensors, str | None]:
    """Give tensors with packed weights under their plain name, and the name of the scheme.

    Parameters
    ----------
    tensors : Tensors
        What is stored.
    config : callable
        Gives what ``config.json`` says of the quantisation.
    source : Place
        The checkpoint, for messages.

    Raises
    ------
    CheckpointError
        When the scheme is not one that is read, or something is missing that it needs.
    """
    derived: dict[str, Derived] = {}
    schemes: list[str] = []
    for name in tensors:
        if (other := next((end for end in _OTHERS if name.endswith(end)), None)) is not None:
            raise CheckpointError(
                f"{source}: {name} is a part of weights packed by {_OTHERS[other]}, which are not "
                f"read; {_UNPACK}"
            )
        for scheme, mark, parts, read in _SCHEMES:
            path = name.removesuffix(mark)
            if path == name or not all(f"{path}{part}" in tensors for part in parts):
                continue
            if f"{path}.weight" in derived:
                continue
            optional = [part for part in _OPTIONAL.get(scheme, ()) if f"{path}{part}" in tensors]
            sources = tuple(f"{path}{part}" for part in (*parts, *optional))
            module = _Module(path, config, source)
            derived[f"{path}.weight"] = Derived(sources, _making(scheme, read, module))
            schemes.append(scheme)
    if not derived:
        return tensors, None
    return tensors.with_derived(derived), min(set(schemes), key=lambda s: -schemes.count(s))


def _making(scheme: str, read: _Reader, module: _Module) -> Callable[[Sequence[Entry]], Entry]:
    def make(parts: Sequence[Entry]) -> Entry:
        shape, values, spacings = read(module, *parts)
        stored = f"{scheme} {[part.stored for part in parts]}"
        return Entry(shape, parts[0].file, values, 4 * math.prod(shape), stored, spacings)

    return make


def _four_bits(
    module: _Module,  # noqa: ARG001
    weight: Entry,
    absmax: Entry,
    code: Entry,
    state: Entry,
    *nested: Entry,
) -> _Read:
    """Read bitsandbytes' NF4 or FP4: blocks of a flat weight, each with its largest number."""
    how = json.loads(bytes(state.read(ALL).tolist()))
    shape, block = tuple(how["shape"]), int(how["blocksize"])
    width = math.prod(shape[1:])

    def looked_up(levels: Tensor, rows: slice) -> Tensor:
        first, last, _ = rows.indices(shape[0])
        begin, end = first * width // block, -(-last * width // block)
        packed = weight.read(ALL).flatten().view(torch.uint8)[begin * block // 2 : end * block // 2]
        indices = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
        flat = levels[indices.long()]
        largest = _largest(how, absmax, nested)[begin:end]
        flat = flat * largest.repeat_interleave(block)[: len(flat)]
        start = first * width - begin * block
        return flat[start : start + (last - first) * width].view(last - first, *shape[1:])

    def levels() -> Tensor:
        return code.read(ALL).float()

    return (
        shape,
        lambda rows: looked_up(levels(), rows),
        lambda rows: looked_up(between(levels()), rows),
    )


def _largest(how: Mapping[str, Any], absmax: Entry, nested: Sequence[Entry]) -> Tensor:
    """Give the largest number of each block, which may be quantised once more."""
    if not nested:
        return absmax.read(ALL).float()
    of_blocks, code = (part.read(ALL).float() for part in nested)
    numbers = code[absmax.read(ALL).long()]
    scales = of_blocks.repeat_interleave(int(how["nested_blocksize"]))[: len(numbers)]
    return numbers * scales + float(how["nested_offset"])


def _int8(
    module: _Module,  # noqa: ARG001
    weight: Entry,
    largest: Entry,
) -> _Read:
    """Read bitsandbytes' LLM.int8: each output feature's largest number stands for 127."""

    def values(rows: slice) -> Tensor:
        return weight.read(rows).float() * step(rows)

    def step(rows: slice) -> Tensor:
        return (largest.read(rows).float() / 127)[:, None]

    return weight.shape, values, lambda rows: step(rows).expand(-1, weight.shape[1])


def _gptq(module: _Module, packed: Entry, zeros: Entry, scales: Entry, group: Entry) -> _Read:
    """Read GPTQ: packed along the input features, whose group is told for each."""
    features, out = group.shape[0], packed.shape[1]
    bits = 32 * packed.shape[0] // features
    _require_whole_words(module, bits)
    module.setting("quant_method")
    # The first form of the format stores zero points less one; older writers did not name it.
    less = 0 if module.config().get("checkpoint_format", "gptq") == "gptq_v2" else 1

    def values(rows: slice) -> Tensor:
        numbers = _unpack(packed.read(ALL)[:, rows].T, bits)
        offsets = _unpack(zeros.read(ALL), bits)[:, rows] + less
        return (numbers - offsets.T[:, group.read(ALL).long()]) * step(rows)

    def step(rows: slice) -> Tensor:
        return scales.read(ALL)[:, rows].float().T[:, group.read(ALL).long()]

    return (out, features), values, step


def _awq(
    module: _Module,  # noqa: ARG001
    packed: Entry,
    zeros: Entry,
    scales: Entry,
) -> _Read:
    """Read AWQ, always of four bits: packed along the output features."""
    features, out = packed.shape[0], scales.shape[1]
    group = features // scales.shape[0]

    def dealt(entry: Entry) -> Tensor:
        words = _unpack(entry.read(ALL), 4)
        return words.view(len(words), -1, len(_AWQ_ORDER))[:, :, _AWQ_ORDER].flatten(1)

    def values(rows: slice) -> Tensor:
        offsets = dealt(zeros)[:, rows].repeat_interleave(group, dim=0)
        return (dealt(packed)[:, rows] - offsets).T * step(rows)

    def step(rows: slice) -> Tensor:
        return scales.read(ALL)[:, rows].float().repeat_interleave(group, dim=0).T

    return (out, features), values, step


def _scaled(module: _Module, weight: Entry, scale: Entry) -> _Read:
    """Read numbers of 8 bits, times one scale in all, one per output feature or per block."""
    (out, _), flat = weight.shape, math.prod(scale.shape)

    def size(rows: slice) -> Tensor:
        first, last, _ = rows.indices(out)
        sizes = scale.read(ALL).float()
        if flat == 1:
            return sizes.flatten()
        if flat == out:
            return sizes.flatten()[rows, None]
        high, wide = module.setting("weight_block_size")
        blocks = sizes[torch.arange(first, last) // high]
        return blocks[:, torch.arange(weight.shape[1]) // wide]

    def values(rows: slice) -> Tensor:
        return weight.read(rows).float() * size(rows)

    def spacings(rows: slice) -> Tensor:
        numbers = weight.read(rows)
        whole = not numbers.dtype.is_floating_point
        apart = torch.ones(numbers.shape) if whole else spacing(numbers.float(), numbers.dtype)
        return apart.float() * size(rows)

    return weight.shape, values, spacings


def _packed(module: _Module, packed: Entry, scale: Entry, shape: Entry) -> _Read:
    """Read compressed-tensors' packed integers, symmetric around 0, packed along the inputs."""
    out, features = (int(size) for size in shape.read(ALL))
    bits = 32 * packed.shape[1] // features
    _require_whole_words(module, bits)

    def values(rows: slice) -> Tensor:
        return (_unpack(packed.read(rows), bits)[:, :features] - (1 << (bits - 1))) * step(rows)

    def step(rows: slice) -> Tensor:
        size = scale.read(rows).float()
        return size.repeat_interleave(features // size.shape[1], dim=1)

    return (out, features), values, step


def _mlx(module: _Module, packed: Entry, scales: Entry, biases: Entry) -> _Read:
    """Read MLX's groups along the input features, each with a scale and a bias."""
    bits, group = int(module.setting("bits")), int(module.setting("group_size"))
    features = scales.shape[-1] * group
    if packed.shape[-1] * 32 != features * bits:
        raise CheckpointError(
            f"{module.source}: {module.path} does not fit {bits} bits in groups of {group}, which "
            "config.json says; it belongs to another checkpoint"
        )
    _require_whole_words(module, bits)

    def values(rows: slice) -> Tensor:
        numbers = _unpack(packed.read(rows).view(torch.int32), bits)
        return numbers * spread(scales, rows) + spread(biases, rows)

    def spread(part: Entry, rows: slice) -> Tensor:
        return part.read(rows).float().repeat_interleave(group, dim=-1)

    return (*packed.shape[:-1], features), values, lambda rows: spread(scales, rows)


def _require_whole_words(module: _Module, bits: int) -> None:
    if bits not in (2, 4, 8):
        raise CheckpointError(
            f"{module.source}: {module.path} is packed in {bits} bits; 2, 4 and 8 are read; "
            f"{_UNPACK}"
        )


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Take the numbers out of words of 32 bits, along the last dimension, the lowest first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


_Reader = Callable[..., _Read]

_NESTED = (".weight.nested_absmax", ".weight.nested_quant_map")
_GPTQ = (".qweight", ".qzeros", ".scales")


def _four_bit_parts(kind: str) -> tuple[str, ...]:
    state = f".weight.quant_state.bitsandbytes__{kind}"
    return ".weight", ".weight.absmax", ".weight.quant_map", state


# Scheme, the part that tells it, all its parts, and what reads them; the first that fits counts.
_SCHEMES: Sequence[tuple[str, str, tuple[str, ...], _Reader]] = (
    ("nf4", ".weight.quant_state.bitsandbytes__nf4", _four_bit_parts("nf4"), _four_bits),
    ("fp4", ".weight.quant_state.bitsandbytes__fp4", _four_bit_parts("fp4"), _four_bits),
    ("int8", ".SCB", (".weight", ".SCB"), _int8),
    ("gptq", ".qweight", (*_GPTQ, ".g_idx"), _gptq),
    ("awq", ".qweight", _GPTQ, _awq),
    ("fp8", ".weight_scale_inv", (".weight", ".weight_scale_inv"), _scaled),
    ("fp8", ".weight_scale", (".weight", ".weight_scale"), _scaled),
    ("packed", ".weight_packed", (".weight_packed", ".weight_scale", ".weight_shape"), _packed),
    ("mlx", ".biases", (".weight", ".scales", ".biases"), _mlx),
)
_OPTIONAL = {"nf4": _NESTED, "fp4": _NESTED}
