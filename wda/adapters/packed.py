"""Frozen layers that bitsandbytes has packed into four or eight bits: QLoRA and QDoRA.

W0 is what the packed numbers stand for (arXiv 2305.14314). DoRA asks for ‖W0‖ and W0·Aᵀ; both are
computed over blocks of rows, so that no more than a block is ever unpacked at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from wda.adapters.frozen import FrozenLinear

# Numbers that are unpacked at a time: 16 MiB of float32.
_BLOCK = 2**22


class FrozenPacked(FrozenLinear):
    """A linear layer whose weight is packed; the adapter's own numbers are float32."""

    packed: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int]:
        """Give (out, features)."""
        return self.layer.out_features, self.layer.in_features

    @property
    def weight(self) -> Float[Tensor, "out features"]:
        """W0, all of it unpacked, in float32."""
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Float[Tensor, "rows features"]:
        """Unpack some rows into float32."""
        raise NotImplementedError

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Unpack block after block of rows."""
        out_features, features = self.shape
        size = max(1, _BLOCK // features)
        for start in range(0, out_features, size):
            stop = min(start + size, out_features)
            yield slice(start, stop), self.rows(start, stop)

    def new_full(self, shape: tuple[int, ...], value: float) -> Tensor:
        """Make a tensor for an adapter, in float32."""
        return torch.full(shape, value, device=self.layer.weight.device)

    def projected(self, A: Float[Tensor, "rank features"]) -> Float[Tensor, "out rank"]:
        """W0·Aᵀ, differentiable in A, for which the blocks are unpacked again."""
        result: Tensor = _Projected.apply(A, self)  # type: ignore[no-untyped-call]
        return result

    def squares(self, dim: int) -> Float[Tensor, "vectors"]:
        """‖W0‖² of every row (1) or column (0)."""
        parts = [rows.square().sum(dim=dim) for _, rows in self.blocks()]
        return torch.cat(parts) if dim == 1 else torch.stack(parts).sum(dim=0)

    def compress(self, x: Tensor, A: Float[Tensor, "rank features"]) -> Tensor:
        """A·x, in the adapter's float32."""
        return functional.linear(x.to(A.dtype), A)


class _Projected(torch.autograd.Function):
    """W0·Aᵀ over blocks of rows of W0, none of which is kept."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, frozen: FrozenPacked) -> Tensor:
        ctx.frozen, ctx.dtype = frozen, A.dtype
        return torch.cat([rows @ A.T.float() for _, rows in frozen.blocks()]).to(A.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        parts = (gradient[part].T.float() @ rows for part, rows in ctx.frozen.blocks())
        return torch.stack(list(parts)).sum(dim=0).to(ctx.dtype), None


class FrozenNF4(FrozenPacked):
    """bitsandbytes' ``Linear4bit``: NF4 or FP4, with a scale for every few numbers."""

    def rows(self, start: int, stop: int) -> Float[Tensor, "rows features"]:
        """Unpack some rows.

        Where a block of numbers reaches over the end of a row, all are unpacked, so that W0 is what
        the layer itself multiplies with: on processors bitsandbytes begins a block at every row.
        """
        from bitsandbytes import functional as unpacking  # noqa: PLC0415 - an extra

        weight, state = self.layer.weight, self.layer.weight.quant_state
        features = self.shape[1]
        if features % state.blocksize:
            return unpacking.dequantize_4bit(weight.data, state).float()[start:stop]
        first, last = start * features, stop * features
        scales = state.absmax
        if state.nested:
            scales = unpacking.dequantize_blockwise(scales, state.state2) + state.offset
        part = unpacking.QuantState(  # type: ignore[no-untyped-call]
            scales[first // state.blocksize : last // state.blocksize].float().contiguous(),
            shape=torch.Size((stop - start, features)),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=torch.float32,
        )
        packed = weight.data.view(-1, 1)[first // 2 : last // 2]
        unpacked: Tensor = unpacking.dequantize_4bit(packed.contiguous(), part)
        return unpacked


class FrozenInt8(FrozenPacked):
    """bitsandbytes' ``Linear8bitLt``: eight-bit integers, a scale for every row."""

    def rows(self, start: int, stop: int) -> Float[Tensor, "rows features"]:
        """Unpack some rows."""
        from bitsandbytes import functional as unpacking  # noqa: PLC0415 - an extra

        weight, state = self.layer.weight, self.layer.state
        numbers = weight.data if weight.CB is None else weight.CB
        scales = state.SCB if weight.SCB is None else weight.SCB
        unpacked: Tensor = unpacking.int8_vectorwise_dequant(
            numbers[start:stop], scales[start:stop]
        )
        return unpacked.float()


_KINDS = {"Linear4bit": FrozenNF4, "Linear8bitLt": FrozenInt8}


def packed_kind(layer: nn.Module) -> type[FrozenPacked] | None:
    """Tell how bitsandbytes packed a layer; None where it did not."""
    # By its name, for importing bitsandbytes takes seconds, and it need not be there.
    kind = type(layer)
    return _KINDS.get(kind.__name__) if kind.__module__.startswith("bitsandbytes.") else None


def hush_bitsandbytes() -> None:
    """Keep it silent: PEFT, diffusers and transformers' trainer import it wherever it is.

    It then tells of kernels that it does without.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
