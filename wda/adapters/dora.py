"""DoRA: Wt = m ⊙ V/‖V‖ with V = W0 + Σ B·A (arXiv 2402.09353, Eq. 5).

With LoRA's factors it is DoRA, with VeRA's DVoRA, with none the magnitude alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from wda.adapters.adapter import Adapter, joined
from wda.adapters.frozen import Frozen, wide
from wda.adapters.kept import Kept
from wda.updates import Update, WeightDecomposed, column_scaled, inner_products

Per = Literal["output", "input"]

# κ, the shift of the output, and what κ scales of every adapter.
Scaled = tuple[Tensor, Tensor | None, list[Tensor]]


class Decomposed:
    """How updates with magnitudes join: Wt = m ⊙ V/‖V‖ with V = W0 + Σ B·A.

    Of several adapters the changes add up, those of the direction and those of the magnitude:
    m = ‖W0‖ + Σ (m_i − ‖W0‖). So their order does not matter, and merging gives what they do apart.

    Parameters
    ----------
    adapters : sequence of Adapter
        Those that take part; all have a magnitude.
    full_gradient : bool
        Whether ‖V‖ is differentiated too (Eq. 6); else it is held constant (Eq. 11), which needs
        less memory.
    per : {"output", "input"}
        Whether a vector is what an output feature weighs, or what an input feature is weighed by.
    """

    def __init__(
        self, adapters: Sequence[Adapter], full_gradient: bool = False, per: Per = "output"
    ) -> None:
        self.adapters = adapters
        self.full_gradient = full_gradient
        self.per = per
        self._squares: Kept[Tensor] = Kept()
        self._projected: Kept[Tensor] = Kept()
        self._gram: Kept[Tensor] = Kept()
        self._kept: Kept[Scaled] = Kept()

    def __call__(self, frozen: Frozen, x: Tensor) -> Tensor:
        """Apply Wt, and the bias.

        κ = m/‖V‖ multiplies the frozen layer's output, and beside it the small B and bias, in
        float32 where the layer is less precise: rounded to half precision, κ near 1 would lose
        what the adapter changes. While κ is 1 no bit changes.
        """
        scale, shift, lefts = self._scaled(frozen)
        if self.per == "input":
            x = (scale * x).to(x.dtype)
            return frozen(x) + self._change(frozen, x, lefts, None)
        out = frozen(x)
        change = self._change(frozen, x, lefts, shift)
        return torch.addcmul(change, frozen.along(scale), out).to(out.dtype)

    def _change(
        self, frozen: Frozen, x: Tensor, lefts: Sequence[Tensor], shift: Tensor | None
    ) -> Tensor:
        """Apply the sum of the adapters' updates, and shift."""
        first, *others = self.adapters
        change = first.apply_to(frozen, x, lefts[0], shift)
        for adapter, left in zip(others, lefts[1:], strict=True):
            change = change + adapter.apply_to(frozen, x, left)
        return change

    def _scaled(self, frozen: Frozen) -> Scaled:
        """Give κ, (1 − κ) ⊙ bias and what κ scales of every adapter.

        Outside of training they are kept until a parameter changes, and computed once for all the
        tokens that are generated.
        """
        sources = [frozen.layer.weight]
        for adapter in self.adapters:
            sources += adapter.tensors
        learns = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        if frozen.layer.training or learns:
            return self._scale_now(frozen)
        return self._kept.get(lambda: self._scale_now(frozen), sources)

    def _scale_now(self, frozen: Frozen) -> Scaled:
        scale, bias = self.scale(frozen), frozen.bias
        if self.per == "input":
            return scale, None, [adapter.left(None) for adapter in self.adapters]
        shift = None if bias is None else ((1 - scale) * bias).to(bias.dtype)
        return scale, shift, [adapter.left(scale) for adapter in self.adapters]

    def update(self, frozen: Frozen) -> Update:
        """Give what turns W0 into Wt."""
        updates = [adapter.update for adapter in self.adapters]
        direction = joined(updates) or updates[0]
        magnitude = self.magnitude(frozen)
        if self.per == "output":
            return WeightDecomposed(direction, magnitude)
        return column_scaled(direction, self.scale(frozen))

    def forget(self) -> None:
        """Drop what was kept."""
        self._kept.forget()

    def scale(self, frozen: Frozen) -> Float[Tensor, "vectors"]:
        """κ = m/‖V‖ of every vector; 0 where V is zero and has no direction to scale."""
        norm = self.direction_norm(frozen)
        return torch.where(norm > 0, self.magnitude(frozen) / torch.where(norm > 0, norm, 1), 0)

    def magnitude(self, frozen: Frozen) -> Float[Tensor, "vectors"]:
        """m of every vector."""  # noqa: D403
        first, *others = [_magnitude(adapter) for adapter in self.adapters]
        if not others:
            return first
        start = self._squared_norm(frozen).sqrt()
        return torch.stack([other - start for other in others]).sum(dim=0) + first

    def direction_norm(self, frozen: Frozen) -> Float[Tensor, "vectors"]:
        """‖V‖ of every vector, without forming V."""
        differentiate = self.full_gradient and torch.is_grad_enabled()
        with torch.set_grad_enabled(differentiate), _precise(frozen.layer.weight.device.type):
            squared = self._squared_norm(frozen) + self._growth(frozen)
            # The root of zero has no gradient.
            return torch.where(squared > 0, squared, 0).sqrt()

    def _squared_norm(self, frozen: Frozen) -> Float[Tensor, "vectors"]:
        """‖W0‖² of every vector."""
        return self._squares.get(lambda: _squares(frozen, self.per), [frozen.layer.weight])

    def _growth(self, frozen: Frozen) -> Float[Tensor, "vectors"] | Literal[0]:
        """‖V‖² − ‖W0‖² = 2c + g of every vector."""
        update = joined([adapter.in_training() for adapter in self.adapters])
        if update is None:
            return 0
        A, B = update.A, update.B
        if self.per == "output":
            projected, gram = self._products(frozen, A)
        else:
            A, B = B.T, A.T
            projected, gram = frozen.weight.T @ A.T, A @ A.T
        dtype = wide(projected)
        c, g = inner_products(projected.to(dtype), gram.to(dtype), B.to(dtype), update.scaling)
        return 2 * c + g

    def _products(self, frozen: Frozen, A: Tensor) -> tuple[Tensor, Tensor]:
        """W0·Aᵀ and A·Aᵀ, computed once where A is never trained."""
        if A.requires_grad or len(self.adapters) > 1:
            return frozen.projected(A), A @ A.T
        return (
            self._projected.get(lambda: frozen.projected(A), [frozen.layer.weight, A]),
            self._gram.get(lambda: A @ A.T, [A]),
        )


def start_magnitude(frozen: Frozen, per: Per = "output") -> Float[Tensor, "vectors"]:
    """‖W0‖ of every vector, float32 where W0 is less precise: what m starts at."""
    with torch.no_grad():
        return _squares(frozen, per).sqrt()


def _squares(frozen: Frozen, per: Per) -> Float[Tensor, "vectors"]:
    return frozen.squares(1 if per == "output" else 0)


def _precise(device: str) -> AbstractContextManager[object]:
    """Keep autocast away: κ − 1 would drown in the rounding of a half-precision norm."""
    # The meta device, on which models are counted, has none.
    there = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if there else nullcontext()


def _magnitude(adapter: Adapter) -> Float[Tensor, "vectors"]:
    assert adapter.magnitude is not None
    return adapter.magnitude
