"""What a training takes, told from a model without weights: memory, arithmetic, room on disk."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wda.adapters.kinds import kind_of
from wda.training.blueprint import Count, count
from wda.training.recipe import Recipe

# Bytes of a number that is trained: its gradient, and AdamW's two moments of it.
_GRADIENT, _MOMENTS = 4, 8

# Bits of a packed number: four and a float32 per 64 of NF4; int8's scale is one per row.
_PACKED_BITS = {"nf4": 4.5, "int8": 8.0}


@dataclass(frozen=True)
class Estimate:
    """What a training takes on each device.

    Attributes
    ----------
    count : Count
        Trained and all parameters.
    weights : int
        Bytes of all parameters.
    trained : int
        Bytes of gradients and of AdamW's moments.
    activations : int
        Bytes that a forward pass of the longest allowed batch keeps for the backward pass; in half
        precision, and with activations computed again, about.
    checkpoint : int
        Bytes of each kept checkpoint.
    flop : float
        Floating-point operations of an optimiser step.
    """

    count: Count
    weights: int
    trained: int
    activations: int
    checkpoint: int
    flop: float

    @property
    def memory(self) -> int:
        """Bytes in all, beside the interpreter and what the libraries take."""
        return self.weights + self.trained + self.activations


def estimate(recipe: Recipe, model: Any, length: int | None = None) -> Estimate:
    """Estimate what a training takes.

    Parameters
    ----------
    recipe : Recipe
        Batch size, lengths, precision.
    model : transformers.PreTrainedModel
        Its blueprint; forward and backward pass run on it, without numbers.
    length : int, optional
        Tokens of a typical text, for the arithmetic; by default as many as ``max_length`` and the
        model allow, which the memory is always told for.

    Returns
    -------
    Estimate
        What is known without running it.
    """
    counted = count(model)
    most = getattr(model.config, "max_position_embeddings", None) or recipe.max_length
    activations, flop = _one_pass(model, _batch(recipe, min(recipe.max_length, most)))
    if length is not None:
        _, flop = _one_pass(model, _batch(recipe, length))
    if recipe.precision != "float32":
        activations //= 2
    if recipe.gradient_checkpointing:
        # The inputs of all layers are kept, and one layer's own at a time.
        activations //= max(1, getattr(model.config, "num_hidden_layers", 1))
    return Estimate(
        count=counted,
        weights=_weights(recipe, model),
        trained=(_GRADIENT + _MOMENTS) * counted.trainable,
        activations=activations,
        checkpoint=4 * counted.trainable,
        flop=flop * recipe.accumulation,
    )


def matmul_rate(precision: str, seconds: float = 0.3) -> float:
    """Measure floating-point operations per second of large matrix products on this machine.

    Parameters
    ----------
    precision : str
        ``float32``, ``bfloat16`` or ``float16``.
    seconds : float
        How long to measure.

    Returns
    -------
    float
        Which trainings come near to, and do not reach.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    size = 1024 if device.type == "cpu" else 8192
    if device.type == "cpu" and precision == "float16":
        precision = "float32"  # no processor multiplies in float16
    a = torch.ones(size, size, dtype=getattr(torch, precision), device=device)
    done, start = 0, time.perf_counter()
    a @ a  # the first is slower
    while (elapsed := time.perf_counter() - start) < seconds or not done:
        a @ a
        done += 1
        if device.type != "cpu":
            torch.accelerator.synchronize()
    return 2.0 * size**3 * (done + 1) / elapsed


def _batch(recipe: Recipe, length: int) -> dict[str, Tensor]:
    shape = (recipe.batch_size, length)
    tokens = torch.zeros(shape, dtype=torch.int64, device="meta")
    labels = tokens[:, 0] if recipe.task == "classification" else tokens
    return {"input_ids": tokens, "labels": labels}


def _one_pass(model: nn.Module, batch: dict[str, Tensor]) -> tuple[int, float]:
    """Give the bytes kept between the passes, and the operations of both."""
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage  # held, so that its number stays its own
        return tensor

    model.train()
    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(**batch).loss
        bytes_kept = sum(storage.nbytes() for storage in kept.values())
        loss.backward()
    model.zero_grad(set_to_none=True)
    return bytes_kept, float(counter.get_total_flops())


def _weights(recipe: Recipe, model: nn.Module) -> int:
    """Give the bytes of the parameters, of packed ones as they are packed."""
    whole = sum(4 * p.numel() for p in model.parameters())
    if recipe.quantised is None:
        return whole
    packed = [
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and kind_of(module) and "head" not in name
    ]
    return whole - sum(packed) * 4 + int(sum(packed) * _PACKED_BITS[recipe.quantised] / 8)
