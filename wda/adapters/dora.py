"""DoRA: y = m ⊙ V·x/‖V‖ with V = W0 + s·B·A (arXiv 2402.09353, Eq. 5)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wda.adapters.kept import Kept
from wda.adapters.lora import LoRALinear
from wda.updates import Update, WeightDecomposed, inner_products


class DoRALinear(LoRALinear):
    """A linear layer whose weight is trained as magnitude and low-rank direction.

    m starts at ‖W0‖, one number per output feature, so that the layer starts as the one it wraps,
    to the last bit. It is float32 where W0 is less precise.

    Parameters
    ----------
    base : nn.Linear or transformers' Conv1D
        The layer to wrap; its parameters are frozen.
    rank : int
        r, the rank of the direction's update.
    scaling : float
        s, the factor in front of B·A.
    full_gradient : bool
        Whether ‖V‖ is differentiated too (Eq. 6); by default it is held constant (Eq. 11), which
        needs less memory.
    """

    def __init__(
        self, base: nn.Module, rank: int, scaling: float, full_gradient: bool = False
    ) -> None:
        super().__init__(base, rank, scaling)
        self.full_gradient = full_gradient
        self._squared_norm, self._kept_scale = Kept(), Kept()
        self.magnitude = nn.Parameter(self.direction_norm().detach())

    @property
    def update(self) -> Update:
        """Wt = m ⊙ V/‖V‖."""
        return WeightDecomposed(super().update, self.magnitude)

    def adapted(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        """Apply m ⊙ (W0 + s·B·A)/‖W0 + s·B·A‖, and the bias.

        κ = m/‖V‖ stays near 1; adding (κ − 1)·W0·x to the frozen layer's own output keeps digits
        in half precision that κ·(W0·x + …) would lose, and changes no bit while κ is 1.
        """
        scale = self.scale()
        out, bias = self.base_layer(x), self.base_layer.bias
        frozen = out if bias is None else out - bias
        adapted = torch.addcmul(out, scale - 1, frozen)
        if len(self.A) > 0:
            adapted = torch.addcmul(adapted, scale, self.low_rank(x))
        return adapted.to(out.dtype)

    def scale(self) -> Float[Tensor, "out"]:
        """κ = m/‖V‖ of every output feature; 0 where V is zero and has no direction to scale.

        Outside of training it is kept until a parameter changes, and computed once for all the
        tokens that are generated.
        """
        sources = [self.weight, self.A, self.B, self.magnitude]
        learns = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        if self.training or learns:
            return self._current_scale()
        return self._kept_scale.get(self._current_scale, sources)

    def train(self, mode: bool = True) -> DoRALinear:
        """Set the mode; what was kept in the other one is dropped."""
        self._kept_scale.forget()
        return super().train(mode)

    def _current_scale(self) -> Float[Tensor, "out"]:
        norm = self.direction_norm()
        turned = norm > 0
        return torch.where(turned, self.magnitude / torch.where(turned, norm, 1), 0)

    def direction_norm(self) -> Float[Tensor, "out"]:
        """‖V‖ of every output feature, without forming V."""
        weight, wide = self.weight, self._wide
        differentiate = self.full_gradient and torch.is_grad_enabled()
        # Under autocast κ − 1 would drown in the rounding of a half-precision norm.
        precise = torch.autocast(weight.device.type, enabled=False)
        with torch.set_grad_enabled(differentiate), precise:
            projected, gram = weight @ self.A.T, self.A @ self.A.T
            c, g = inner_products(projected.to(wide), gram.to(wide), self.B.to(wide), self.scaling)
            squared = self._squared_norm.get(self._frozen_squares, [weight]) + 2 * c + g
            # The root of zero has no gradient.
            return torch.where(squared > 0, squared, 0).sqrt()

    def _frozen_squares(self) -> Float[Tensor, "out"]:
        """‖W0‖² of every output feature."""
        norm: Tensor = torch.linalg.vector_norm(self.weight, dim=1, dtype=self._wide)
        return norm.square()

    @property
    def _wide(self) -> torch.dtype:
        """The dtype of κ and what it is made of; in half precision κ − 1 would be lost."""
        return torch.promote_types(self.weight.dtype, torch.float32)
