"""The same gradients under every setting of training: checkpointing, accumulation, autocast, …"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapted import perturb, tiny_llama
from torch import Tensor, nn

from wda.adapters import AdapterConfig, inject, merge, unmerge

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 3, "alpha": 7},
    "dora": {"method": "dora", "rank": 3, "alpha": 7},
    "dora, full gradient": {"method": "dora", "rank": 3, "alpha": 7, "full_gradient": True},
    "dvora": {"method": "dvora", "rank": 30},
}


def adapted(case: str, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny LLaMA whose adapters are trained a little."""
    model = tiny_llama(attention_bias=True).to(dtype)
    inject(model, AdapterConfig(targets=["query", "value", "down"], **METHODS[case]))
    perturb(model, 0.1)
    return model.train()


IDS = torch.randint(1, 50, (4, 9), generator=torch.Generator().manual_seed(2))


def gradients(model: Any, ids: Tensor = IDS) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return collected(model)


def collected(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found.values())
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=rtol * largest)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", METHODS)
def test_gradient_checkpointing(case: str, reentrant: bool) -> None:
    model = adapted(case)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # a checkpoint of this kind needs an input with a gradient
        model.enable_input_require_grads()
    assert_same(gradients(model), expected, 1e-12)


@pytest.mark.parametrize("case", METHODS)
def test_accumulation(case: str) -> None:
    model = adapted(case)
    expected = gradients(model)
    model.zero_grad()
    for part in IDS.chunk(2):
        (model(part, labels=part).loss / 2).backward()
    assert_same(collected(model), expected, 1e-12)


@pytest.mark.parametrize("case", METHODS)
def test_autocast_keeps_the_scale_precise(case: str) -> None:
    """In bfloat16 the gradients of float32 weights are near those without, as LoRA's are."""
    model = adapted(case, torch.float32)
    expected = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    found = collected(model)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() < 0.05 * gradient.norm(), name


@pytest.mark.parametrize("case", METHODS)
def test_copies_and_saved_models_are_the_model(case: str, tmp_path: Path) -> None:
    model = adapted(case)
    expected = gradients(model)
    assert_same(gradients(copy.deepcopy(model)), expected, 1e-13)
    torch.save(model, tmp_path / "model.pt")
    assert_same(gradients(torch.load(tmp_path / "model.pt", weights_only=False)), expected, 1e-13)
    other = adapted(case)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    if case != "dvora":  # its projections are in the adapter's file, not in a state dict
        other.load_state_dict(model.state_dict())
        assert_same(gradients(other), expected, 1e-13)


@pytest.mark.parametrize("case", METHODS)
def test_generation_is_the_same_merged_and_apart(case: str) -> None:
    model = adapted(case).eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(IDS[:1], use_cache=True, **settings)
    assert torch.equal(model.generate(IDS[:1], use_cache=False, **settings), with_cache)
    merge(model)
    assert torch.equal(model.generate(IDS[:1], **settings), with_cache)
    unmerge(model)


@pytest.mark.parametrize("case", METHODS)
def test_adapters_go_into_a_model_without_numbers(case: str) -> None:
    with torch.device("meta"):
        shape = transformers.LlamaConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=4)
        model = transformers.LlamaForCausalLM(shape)
    assert inject(model, AdapterConfig(targets=["query"], **METHODS[case])) == 1
    assert {p.device.type for p in model.parameters()} == {"meta"}


COMPILED = """
import sys, torch
sys.path.insert(0, {tests!r})
import test_adapters_settings as t
for case in t.METHODS:
    model = t.adapted(case)
    expected = t.gradients(model)
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    compiled(t.IDS, labels=t.IDS).loss.backward()
    t.assert_same(t.collected(model), expected, 1e-12)
"""

DISTRIBUTED = """
import os, sys, torch
import torch.distributed as dist
sys.path.insert(0, {tests!r})
import test_adapters_settings as t
dist.init_process_group("gloo")
rank = dist.get_rank()
part = t.IDS.chunk(2)[rank]
for case in t.METHODS:
    expected = t.gradients(t.adapted(case))
    model = torch.nn.parallel.DistributedDataParallel(t.adapted(case))
    model(part, labels=part).loss.backward()
    t.assert_same(t.collected(model.module), expected, 1e-12)
dist.destroy_process_group()
"""

SHARDED = """
import os, sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
sys.path.insert(0, {tests!r})
import test_adapters_settings as t
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
part = t.IDS.chunk(2)[dist.get_rank()]
for case in t.METHODS:
    plain = t.adapted(case)
    optimiser = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    expected = t.gradients(plain)
    optimiser.step()
    with torch.no_grad():
        after = plain.eval()(t.IDS).logits
    model = t.adapted(case)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.eval()
    with torch.no_grad():
        model(t.IDS)  # what evaluation keeps must not outlive the step
    model.train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(part, labels=part).loss.backward()
    found = {{n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}}
    t.assert_same(found, expected, 1e-12)
    optimiser.step()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(t.IDS).logits, after, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model(t.IDS).logits, after, rtol=1e-12, atol=1e-12)
dist.destroy_process_group()
"""


def run(code: str, folder: Path, processes: int = 1, port: int = 29533) -> None:
    """In processes of their own, for shape checks cannot be compiled, and groups are global."""
    file = folder / "settings.py"
    file.write_text(code.format(tests=str(Path(__file__).parent)))
    alone = [sys.executable, file]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        alone if processes == 1 else [*command, "--master-port", str(port), file],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_compiled_model(tmp_path: Path) -> None:
    run(COMPILED, tmp_path)


@pytest.mark.slow
def test_two_processes_with_a_copy_each(tmp_path: Path) -> None:
    run(DISTRIBUTED, tmp_path, processes=2, port=29534)


@pytest.mark.slow
def test_two_processes_with_a_share_each(tmp_path: Path) -> None:
    run(SHARDED, tmp_path, processes=2, port=29535)
