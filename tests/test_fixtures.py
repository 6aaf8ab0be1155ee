"""Checkpoints that other libraries wrote, beside the weights as those libraries merge them.

Each folder in ``fixtures`` has ``base``, ``checkpoint``, ``truth.safetensors`` (Wt under the names
of the base) and ``about.json``; the script that made it lies in ``fixtures/makers``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import wda

FIXTURES = sorted(path.parent for path in (Path(__file__).parent / "fixtures").glob("*/about.json"))


def manifest(fixture: Path, options: dict[str, object], folder: Path) -> Path:
    """Write what a user would: the checkpoint, and what it does not say itself."""
    checkpoint = next(path for path in fixture.iterdir() if path.stem == "checkpoint")
    file = folder / "manifest.yaml"
    content = {
        "base": str(fixture / "base"),
        "matrices": ["re:.*"],
        "runs": [{"path": str(checkpoint), **options}],
    }
    file.write_text(json.dumps(content))  # JSON is YAML
    return file


def by_definition(w0: torch.Tensor, wt: torch.Tensor, turned: bool) -> tuple[float, float]:
    """ΔM and ΔD per output feature, from their definitions in float64."""
    features = 0 if turned else 1
    m0, mt = w0.norm(dim=features), wt.norm(dim=features)
    cosine = (w0 * wt).sum(dim=features) / (m0 * mt)
    return float((mt - m0).abs().mean()), float((1 - cosine).mean())


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name)
def test_the_table_is_that_of_the_merged_weights(fixture: Path, tmp_path: Path) -> None:
    about = json.loads((fixture / "about.json").read_text())
    table = wda.compare(
        manifest(fixture, about.get("options", {}), tmp_path), cache=False, progress=False
    ).table
    base = load_file(fixture / "base" / "model.safetensors")
    truth = load_file(fixture / "truth.safetensors")
    measured = table.set_index("module")
    seen = 0
    for name, wt in truth.items():
        module = name.removesuffix(".weight")
        if wt.ndim < 2 or module not in measured.index:
            continue
        w0 = base[name].double().flatten(1)
        turned = (row.out_features, row.in_features) != tuple(w0.shape)
        delta_m, delta_d = by_definition(w0, wt.double().reshape(w0.shape), turned)
        assert row.delta_m == pytest.approx(delta_m, rel=about["tolerance"], abs=1e-13), name
        assert row.delta_d == pytest.approx(delta_d, rel=about["tolerance"], abs=1e-13), name
        seen += 1
    assert seen == len(measured), "the truth has to hold every matrix that was measured"
    assert seen > 0
    assert (measured.delta_m + measured.delta_d > 0).any()
