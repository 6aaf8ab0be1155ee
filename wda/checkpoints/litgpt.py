"""LoRA and whole models as LitGPT writes them.

An adapter's names end in ``lora_A`` (rank, in) and ``lora_B`` (out, rank), without ``.weight``; its
settings stand in ``hyperparameters.yaml``, the model's in ``model_config.yaml``. Queries, keys and
values are one projection, and each has factors of its own. Before 0.5.5 that projection was called
``attn``, and its rows lay together by query group; with factors for all three their updates were
nevertheless added one behind the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Self

import yaml

from wda.checkpoints.adapter import Adapter
from wda.checkpoints.factors import sort_names
from wda.checkpoints.forms import Factors, Form, Stored
from wda.checkpoints.found import Found
from wda.checkpoints.full import FullCheckpoint
from wda.checkpoints.fused_forms import BlockDiagonal, Reordered, Rows, Share, behind
from wda.checkpoints.respelled import RespelledModel
from wda.errors import CheckpointError
from wda.fused import ATTENTION, parts
from wda.naming import align
from wda.places import Place

_MODEL, _SETTINGS = "model_config.yaml", "hyperparameters.yaml"

_ENDINGS = {"A": re.compile(r"\.lora_A$"), "B": re.compile(r"\.lora_B$")}
_FUSED = re.compile(r"\.attn\.(qkv|attn)$")
_LAYER = re.compile(r"^transformer\.h\.(\d+)\.(.+)$")
_FUSED_HERE = {"attn.qkv", "attn.attn"}
# What Hugging Face fuses for some models → what it holds here.
_FUSED_AS = {
    "self_attn.qkv_proj": ("attn.qkv", "attn.attn"),
    "mlp.gate_up_proj": ("mlp.fc_1", "mlp.fc_2"),
}
_LABELS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}

# What LitGPT calls the modules of a Llama → Hugging Face's names.
_HUGGING_FACE = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
    **{
        f"attn.{fused}.{label}": f"self_attn.{name}"
        for label, name in _LABELS.items()
        for fused in ("qkv", "attn")
    },
}


class LitGptModel(RespelledModel):
    """A folder with ``lit_model.pth``: a base, or a full fine-tuning of it."""

    layout = "LitGPT model"
    evidence = "lit_model.pth with model_config.yaml"
    step_files = re.compile(r"step-(\d+)")

    @classmethod
    def open(cls, found: Found) -> Self | None:
        """Open a folder that has the model's configuration."""
        if found.file is None or found.file.name != "lit_model.pth" or not found.has(_MODEL):
            return None
        return cls(found, found.tensors)

    @property
    def config(self) -> dict[str, Any]:
        """Its configuration, with the words that Hugging Face uses."""
        if self._config is None:
            folder = self.path if self.path.is_dir() else self.path.parent
            old = any(name.endswith(".attn.attn.weight") for name in self.tensors)
            self._config = _in_their_words(_read_yaml(folder / _MODEL), old)
        return self._config

    def paths_in(self, base: FullCheckpoint) -> Mapping[str, str] | None:
        """Give Hugging Face's path of every module of a Llama, whose projections may be fused."""
        if any(map(_FUSED.search, base.modules)):
            return None
        fused = [word for word in _FUSED_AS if any(m.endswith(f".{word}") for m in base.modules)]
        held = {here for word in fused for here in _FUSED_AS[word]}
        paths, layers = {}, set()
        for module in sorted(self.modules):
            layer = _LAYER.match(module)
            inner = layer.group(2) if layer else module
            layers |= {layer.group(1)} if layer else set()
            if inner not in held:
                labels = ATTENTION if inner in _FUSED_HERE else ()
                for own in [f"{module}.{label}" for label in labels] or [module]:
                    paths[own] = _hugging_face_name(own) or own
        return paths | {
            f"transformer.h.{n}.{word}": f"model.layers.{n}.{word}"
            for word in fused
            for n in sorted(layers)
        }

    def pieces(self, module: str) -> tuple[Stored, ...]:
        """Give the tensors, or rows of the fused one, of a module of either layout."""
        layer = _LAYER.match(module)
        if module in self.modules or layer is None:
            return super().pieces(module)
        start, inner = f"transformer.h.{layer.group(1)}", layer.group(2)
        if inner == "mlp.gate_up_proj":
            return tuple(
                Stored(self.tensors, f"{start}.mlp.{fc}.weight") for fc in ("fc_1", "fc_2")
            )
        whole = next(name for name in _FUSED_HERE if f"{start}.{name}.weight" in self.tensors)
        places, _ = _places(self.config, whole.rpartition(".")[2])
        labels = ATTENTION if inner == "self_attn.qkv_proj" else (inner.rpartition(".")[2],)
        order = tuple(rows for label in labels for rows in places[label])
        return (Reordered(self.tensors, f"{start}.{whole}.weight", order=order),)


class LitGptAdapter(Adapter):
    """A folder with ``lit_model.pth.lora``."""

    layout = "LitGPT LoRA"
    evidence = "lit_model.pth.lora, or lora_A beside model_config.yaml"
    step_files = LitGptModel.step_files

    @classmethod
    def open(cls, found: Found) -> Self | None:
        """Open an adapter with the two files that tell what its numbers mean."""
        if found.file is None or not any(map(_ENDINGS["A"].search, found.tensors)):
            return None
        if not found.file.name.endswith(".pth.lora") and found.has(_MODEL) is None:
            return None
        for name in (_MODEL, _SETTINGS):
            if found.has(name) is None:
                raise CheckpointError(
                    f"{found.folder}: no {name} beside {found.file.name}, which tells what its "
                    "numbers mean; copy it from the training's output"
                )
        settings = _read_yaml(found.folder / _SETTINGS)
        alpha = found.given.alpha or settings.get("lora_alpha")
        if alpha is None:
            raise CheckpointError(f"{found.folder / _SETTINGS}: no lora_alpha; give it: --alpha")
        names = sort_names(found.path, found.tensors, _ENDINGS, prefix="")
        names.require_pairs()
        forms: dict[str, Form] = {}
        shares: dict[str, Form] = {}
        enabled = [label for label in ATTENTION if settings.get(f"lora_{label}")]
        for module in names["A"]:
            a, b = names.stored("A", module), names.stored("B", module)
            fused = _FUSED.search(module)
            if fused is None:
                forms[module] = Factors(a, b, float(alpha) / b.shape[1])
                continue
            old = fused.group(1) == "attn"
            config = _in_their_words(_read_yaml(found.folder / _MODEL), old)
            places, total = _places(config, fused.group(1))
            blocks = _behind(places) if old and len(enabled) == len(ATTENTION) else places
            rows = tuple(blocks[label] for label in enabled)
            if b.shape[0] != sum(len(r) for block in rows for r in block):
                raise CheckpointError(
                    f"{found.path}: {module} has {b.shape[0]} rows in lora_B, which are not those "
                    f"of {', '.join(enabled)} by {_MODEL} and {_SETTINGS}; all files must come "
                    "from one training"
                )
            form = BlockDiagonal(a, b, rows, total, float(alpha) / b.shape[1])
            forms[module] = form
            touched = places if blocks is not places else dict.fromkeys(enabled)
            shares |= {f"{module}.{label}": Share(form, places[label]) for label in touched}
        base = str(settings.get("checkpoint_dir") or "") or None
        adapter = cls(found, found.tensors, forms, "lora", names.frozen, base)
        adapter.forms |= shares
        return adapter

    def names_in(self, base: FullCheckpoint) -> Mapping[str, str]:
        """Give a LitGPT base's names, or Hugging Face's of a Llama with its projections apart."""
        if any(map(_FUSED.search, base.modules)):
            return super().names_in(base)
        theirs = {
            module: renamed
            for module in sorted(self.forms)
            if (renamed := _hugging_face_name(module)) is not None
        }
        rename = align(theirs.values(), base.modules)
        return {module: rename(renamed) for module, renamed in theirs.items()}


def _hugging_face_name(module: str) -> str | None:
    """Give Hugging Face's name; None for a projection that is fused here alone."""
    if _FUSED.search(module):
        return None
    if (layer := _LAYER.match(module)) is None:
        return _HUGGING_FACE.get(module, module)
    inner = _HUGGING_FACE.get(layer.group(2), layer.group(2))
    return f"model.layers.{layer.group(1)}.{inner}"


def _places(config: Mapping[str, Any], name: str) -> tuple[dict[str, Rows], int]:
    """Tell which rows of the fused projection are queries, keys and values, and how many it has."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    rows = (heads + 2 * groups) * config["head_dim"]
    return parts(name, (rows, config["hidden_size"]), config), rows


def _behind(places: Mapping[str, Rows]) -> dict[str, Rows]:
    return behind({label: sum(map(len, rows)) for label, rows in places.items()})


def _in_their_words(config: Mapping[str, Any], interleaved: bool) -> dict[str, Any]:
    """Say a LitGPT configuration in Hugging Face's words."""
    heads, width = int(config["n_head"]), int(config["n_embd"])
    return {
        "model_type": "litgpt_interleaved" if interleaved else "litgpt",
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": int(config.get("n_query_groups") or heads),
        "head_dim": int(config.get("head_size") or width // heads),
    }


def _read_yaml(file: Place) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected settings, found a {type(content).__name__}")
    return content
