"""Weight normalisation: Wt = m ⊙ V/‖V‖ with all of V trained (arXiv 1602.07868), DoRA's ancestor.

It is torch's own, on the axis of the paper on DoRA: one m per output feature. V starts at W0. Both
take their gradients, that of V across V, as in DoRA's Eq. 6.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


def normalise(layer: nn.Linear) -> None:
    """Put m and V in the place of a layer's weight, and train both.

    Parameters
    ----------
    layer : nn.Linear
        The layer.
    """
    parametrizations.weight_norm(layer, dim=0)
    for parameter in _parts(layer):
        parameter.requires_grad_(True)


def normalised(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Give m (out, 1) and V (out, in) of the normalised layers, by the names of their modules."""
    return {
        name: _parts(module)
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module, "weight")
    }


def _parts(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    weight = layer.get_submodule("parametrizations.weight")
    return weight.get_parameter("original0"), weight.get_parameter("original1")
