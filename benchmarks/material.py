"""Checkpoints of LLaMA-7B-shaped query and value matrices, made of random numbers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZE = 4096
RELATIVE_UPDATE = 0.01


def names(matrices: int) -> list[str]:
    """Give as many LLaMA names of query and value matrices."""
    return [f"model.layers.{i // 2}.self_attn.{'qv'[i % 2]}_proj.weight" for i in range(matrices)]


def make_base(folder: Path, matrices: int) -> Path:
    """Write a base in bfloat16."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    weights = {name: (0.02 * torch.randn(SIZE, SIZE)).bfloat16() for name in names(matrices)}
    save_file(weights, folder / "model.safetensors")
    return folder


def make_full(folder: Path, base: Path, seed: int) -> Path:
    """Write a fully fine-tuned checkpoint of it."""
    from safetensors.torch import load_file  # noqa: PLC0415

    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    weights = load_file(base / "model.safetensors")
    moved = {
        name: (w.float() + RELATIVE_UPDATE * 0.02 * torch.randn(SIZE, SIZE)).bfloat16()
        for name, w in weights.items()
    }
    save_file(moved, folder / "model.safetensors")
    return folder


def make_adapter(folder: Path, matrices: int, rank: int, dora: bool, seed: int) -> Path:
    """Write a LoRA or DoRA adapter in float32."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    tensors = {}
    for name in names(matrices):
        path = "base_model.model." + name.removesuffix(".weight")
        tensors[f"{path}.lora_A.weight"] = torch.randn(rank, SIZE) / SIZE**0.5
        tensors[f"{path}.lora_B.weight"] = 1e-3 * torch.randn(SIZE, rank)
        if dora:
            magnitude = 0.02 * SIZE**0.5 * (1 + 0.01 * torch.randn(SIZE))
            tensors[f"{path}.lora_magnitude_vector"] = magnitude
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "use_dora": dora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
