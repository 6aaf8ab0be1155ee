"""Shape checks at test time, and small models that the tests build themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
import transformers
from jaxtyping import install_import_hook
from safetensors.torch import save_file
from servers import Hub, serving

# Every jaxtyping annotation in these rooms is checked while the tests run; it costs users nothing.
install_import_hook(
    [
        *("wda.decomposition", "wda.rows", "wda.updates", "wda.adapters.lora", "wda.adapters.vera"),
        *(
            "wda.adapters.dora",
            "wda.adapters.frozen",
            "wda.spectra.spectrum",
            "wda.spectra.directions",
        ),
    ],
    "beartype.beartype",
)
mpl.use("Agg")

# Hidden size 12, value size 8: no matrix of the pico model is square, so no transpose goes unseen.
PICO_SHAPES = {
    "query": (10, 12),
    "key": (10, 12),
    "value": (8, 12),
}
PICO_LAYERS = 3


def pico_weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights of a BERT-like encoder, enough of one to be compared."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"embeddings.word_embeddings.weight": torch.randn(40, 12, generator=generator)}
    for layer in range(PICO_LAYERS):
        for name, shape in PICO_SHAPES.items():
            path = f"encoder.layer.{layer}.attention.self.{name}"
            tensors[f"{path}.weight"] = torch.randn(shape, generator=generator)
            tensors[f"{path}.bias"] = torch.zeros(shape[0])
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def moved(weights: dict[str, torch.Tensor], size: float, seed: int) -> dict[str, torch.Tensor]:
    """Give weights with a random change of relative size ``size`` in every tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (t + size * torch.randn(t.shape, generator=generator)).to(t.dtype)
        for name, t in weights.items()
    }


def save_model(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return folder


def save_pico_adapter(
    folder: Path, method: str = "lora", seed: int = 0, rank: int = 3, **config: object
) -> dict[str, torch.Tensor]:
    """Write an adapter for query and value of the pico model, by hand, and give its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    base = pico_weights()
    tensors = {}
    for layer in range(PICO_LAYERS):
        for name in ("query", "value"):
            out, features = PICO_SHAPES[name]
            module = f"encoder.layer.{layer}.attention.self.{name}"
            path = f"base_model.model.{module}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, features, generator=generator)
            tensors[f"{path}.lora_B.weight"] = 0.1 * torch.randn(out, rank, generator=generator)
            if method == "dora":
                norm = base[f"{module}.weight"].norm(dim=1)
                noise = 0.05 * torch.randn(out, generator=generator)
                tensors[f"{path}.lora_magnitude_vector"] = norm * (1 + noise)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 5,
        "use_dora": method == "dora",
        "base_model_name_or_path": None,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return tensors


# Put before a command, lets it hear Ctrl-C also where the suite runs in the background, which does
# not.
HEARING_CTRL_C = [
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])",
]


WDA = Path(sys.executable).parent / "wda"


def wda_command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the installed command as a user would."""
    return subprocess.run(
        [str(WDA), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session", autouse=True)
def kept_results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep results away from the user's own; drawing keeps its fonts where they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", mpl.get_cachedir())
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def short_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder in which `wda demo --steps 8` was run, on the real model and data."""
    folder = tmp_path_factory.mktemp("demo")
    done = wda_command("demo", "--steps", 8, cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A pico base model on disk."""
    return save_model(tmp_path / "base", pico_weights())


@pytest.fixture
def runs(tmp_path: Path, base: Path) -> dict[str, Path]:
    """Pico runs on disk: ft, lora and dora, three checkpoints each."""
    folders = {}
    for method in ("ft", "lora", "dora"):
        folders[method] = tmp_path / "runs" / method
        for i, step in enumerate((9, 10, 100)):
            folder = folders[method] / f"checkpoint-{step}"
            if method == "ft":
                save_model(folder, moved(pico_weights(), 0.02 * (i + 1), seed=i))
            else:
                save_pico_adapter(folder, method, seed=i, base_model_name_or_path=str(base))
    return folders


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A Hub with one repository, org/pico."""
    from huggingface_hub import constants

    folder = save_model(tmp_path / "repository", pico_weights())
    (folder / "training_script.py").write_text("print()")
    template = "/{repo_id}/resolve/{revision}/{filename}"
    with serving(Hub, folder) as (handler, endpoint):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield handler


WORDS = ["good", "fine", "great", "bad", "poor", "dull", "film", "plot", "it", "was"]


@pytest.fixture(scope="session")
def trainable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with its tokenizer, and sentences whose class can be read off them."""
    folder = tmp_path_factory.mktemp("material")
    config = transformers.BertConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        vocab_size=5 + len(WORDS),
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder / "base")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder / "base")
    lines = ["text,label,source"]
    generator = torch.Generator().manual_seed(0)
    for i in range(120):
        label = i % 2
        mood = WORDS[(0 if label else 3) + int(torch.randint(3, (1,), generator=generator))]
        rest = [WORDS[6 + int(j)] for j in torch.randint(4, (1 + i % 5,), generator=generator)]
        lines.append(f"{' '.join([*rest, mood])},{label},a")
        lines.append("good bad,1,b")
    (folder / "data.csv").write_text("\n".join(lines) + "\n")
    return folder
