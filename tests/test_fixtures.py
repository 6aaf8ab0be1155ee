"""Checkpoints that other libraries wrote, beside the weights as those libraries merge them.

Each folder in ``fixtures`` has ``base``, ``checkpoint``, ``truth.safetensors`` (Wt under the names
of the base) and ``about.json``; the script that made it lies in ``fixtures/makers``.
``make fixtures`` runs these scripts, each in an environment with the libraries that it names.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import wda
from wda.checkpoints import open_base
from wda.naming import find_matrices

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


def tensors_in(base: Path) -> dict[str, torch.Tensor]:
    """Load a model, or the parts of a pipeline under the names of their folders."""
    if (file := base / "lit_model.pth").is_file():
        return torch.load(file, weights_only=True)
    return {
        ".".join([*file.relative_to(base).parts[:-1], name]): tensor
        for file in base.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


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
    base = tensors_in(fixture / "base")
    truth = load_file(fixture / "truth.safetensors")
    config = open_base(fixture / "base").config
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    matrices = {(m.module, m.label): m for m in find_matrices(shapes, config=config)}
    for row in table.itertuples():
        name, matrix = f"{row.module}.weight", matrices[row.module, row.matrix]
        assert name in truth, "the truth has to hold every matrix that was measured"
        w0, wt = (matrix.take(t[name].double().flatten(1)) for t in (base, truth))
        turned = (row.out_features, row.in_features) != tuple(w0.shape)
        delta_m, delta_d = by_definition(w0, wt, turned)
        assert row.delta_m == pytest.approx(delta_m, rel=about["tolerance"], abs=1e-13), name
        assert row.delta_d == pytest.approx(delta_d, rel=about["tolerance"], abs=1e-13), name
    assert set(truth) & {f"{module}.weight" for module in table["module"]}
    assert (table.delta_m + table.delta_d > 0).any()
