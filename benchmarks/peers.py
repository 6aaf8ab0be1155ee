"""What wda is measured against: the usual notebook, peft's way of merging, the machine itself."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, safe_open
from torch.nn.functional import cosine_similarity


def notebook(base: Path, checkpoints: list[Path]) -> list[tuple[float, float]]:
    """Load both models, and compare matrix by matrix in float32."""
    w0s = load_file(base / "model.safetensors")
    found = []
    for folder in checkpoints:
        wts = load_file(folder / "model.safetensors")
        for name, stored in w0s.items():
            w0, wt = stored.float(), wts[name].float()
            delta_m = (wt.norm(dim=1) - w0.norm(dim=1)).abs().mean()
            delta_d = (1 - cosine_similarity(wt, w0, dim=1)).mean()
            found.append((float(delta_m), float(delta_d)))
    return found


def merging(base: Path, checkpoints: list[Path]) -> list[tuple[float, float]]:
    """Form s·B·A, merge as peft does, and compare in float32."""
    w0s = load_file(base / "model.safetensors")
    found = []
    for folder in checkpoints:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, stored in w0s.items():
            path = "base_model.model." + name.removesuffix(".weight")
            w0 = stored.float()
            product = tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]
            wt = w0 + config["lora_alpha"] / config["r"] * product
            if config["use_dora"]:
                scale = tensors[f"{path}.lora_magnitude_vector"] / wt.norm(dim=1)
                wt = scale[:, None] * wt
            delta_m = (wt.norm(dim=1) - w0.norm(dim=1)).abs().mean()
            delta_d = (1 - cosine_similarity(wt, w0, dim=1)).mean()
            found.append((float(delta_m), float(delta_d)))
    return found


def open_mapped(folders: list[Path]) -> list[np.ndarray]:
    """Map the tensors of several models, as integers."""
    arrays = []
    for folder in folders:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            arrays += [file.get_tensor(name).view(torch.int64).numpy() for name in file.keys()]  # noqa: SIM118
    return arrays


def streaming(arrays: list[np.ndarray], threads: int) -> int:
    """Read the mapped bytes once: the sum of the buffer as integers."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(map(int, pool.map(np.sum, arrays)))


def matrix_multiply(dtype: torch.dtype, columns: int) -> int:
    """Multiply a large matrix with a tall one; give the floating-point operations."""
    a, b = _operands(dtype, columns)
    _ = a @ b
    return 2 * a.shape[0] * a.shape[1] * columns


_kept: dict[tuple[torch.dtype, int], tuple[torch.Tensor, torch.Tensor]] = {}


def _operands(dtype: torch.dtype, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    if (dtype, columns) not in _kept:
        pair = torch.randn(4096, 4096, dtype=dtype), torch.randn(4096, columns, dtype=dtype)
        _kept[dtype, columns] = pair
    return _kept[dtype, columns]
