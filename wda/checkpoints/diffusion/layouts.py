"""LoRA files of image models: kohya's names, and those of diffusers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from wda.checkpoints.adapter import Adapter
from wda.checkpoints.diffusion import contents
from wda.checkpoints.diffusion.parts import names_in_base, split_word
from wda.checkpoints.factors import Names
from wda.checkpoints.forms import Decomposed
from wda.checkpoints.found import Found
from wda.checkpoints.peft.initial import HARMLESS
from wda.checkpoints.peft.versions import rank_and_alpha
from wda.errors import CheckpointError, listing
from wda.naming import Matrix
from wda.updates import Update

if TYPE_CHECKING:
    from wda.checkpoints.full import FullCheckpoint

_METADATA = "lora_adapter_metadata"


class KohyaCheckpoint(Adapter):
    """A file of kohya's sd-scripts, LyCORIS or OneTrainer, which write ``_`` for dots."""

    layout = "adapter of sd-scripts, LyCORIS or OneTrainer"
    evidence = "keys such as lora_unet_….lora_down.weight, without dots in the module's path"
    step_files = re.compile(r".*(?:-step|_)(\d{8,9})\.safetensors")  # sd-scripts', ai-toolkit's

    @classmethod
    def open(cls, found: Found) -> Self | None:
        """Open a file, or a folder with one, whose module paths are flat."""
        if not _is_adapter(found) or not _is_flat(found):
            return None
        names = contents.sort(found)
        return cls._of(found, names, _Scalings(found, names))

    @classmethod
    def _of(cls, found: Found, names: Names, scalings: _Scalings) -> Self:
        forms = contents.forms(found, names, scalings, bool(scalings.configs))
        method = contents.method(forms)
        return cls(found, found.tensors, forms, method, contents.accounted(names))

    def names_in(self, base: FullCheckpoint) -> Mapping[str, str]:
        """Find the base's names, part by part."""
        return names_in_base(self.modules, base.modules)

    def update(
        self, module: str, matrix: Matrix, base: FullCheckpoint, rows: slice | None = None
    ) -> Update:
        """Read the update of a matrix, after making sure that magnitudes are lengths."""
        form = self.forms[module]
        per_input = form if isinstance(form, Decomposed) and form.axis == "input" else None
        if per_input and bool((per_input.magnitude.read() < 0).any()):
            raise CheckpointError(
                f"{self.path}: {per_input.magnitude.name} has negative numbers per input, as "
                "LyCORIS 2 stored means where later versions have lengths; merge the adapter with "
                "the version that trained it and compare the merged model"
            )
        return super().update(module, matrix, base, rows)


class DiffusersCheckpoint(KohyaCheckpoint):
    """A file of diffusers, ai-toolkit or OneTrainer with the dots of module paths."""

    layout = "adapter of diffusers"
    evidence = "keys such as unet.….lora_A.weight or ….lora.down.weight"

    @classmethod
    def open(cls, found: Found) -> Self | None:
        """Open a file, or a folder with one, whose module paths have dots."""
        if not _is_adapter(found) or not (
            _METADATA in found.tensors.metadata or _is_of_images(found)
        ):
            return None
        names = contents.sort(found)
        return cls._of(found, names, _Scalings(found, names))


class _Scalings:
    """The factor s of every module, from all places where such files store it.

    Parameters
    ----------
    found : Found
        The adapter, and what the user says of it.
    names : Names
        Its tensors.
    """

    def __init__(self, found: Found, names: Names) -> None:
        self._found, self._names = found, names
        self._alphas = contents.alphas(names)
        self.configs = _configs(found)
        self._is_toolkits_dora = any(name.endswith(".magnitude") for name in found.tensors)
        toolkit = self._is_toolkits_dora or "ai-toolkit" in found.tensors.metadata.get(
            "software", ""
        )
        # With these names ai-toolkit trains with alpha as the rank, and stores none.
        self._is_rank = toolkit and any(name.endswith(".lora_A.weight") for name in found.tensors)

    def __call__(self, module: str, rank: int) -> float:
        """Give the factor s of a module."""
        if (alpha := self._alphas.get(module)) is not None:
            return alpha / rank
        word, path = split_word(module)
        if config := self.configs.get(word):
            return _of_config(self._found, config, path, rank)
        if self._is_rank:
            return 1.0
        if (given := self._found.given.alpha) is not None:
            if self._is_toolkits_dora and given != rank:
                raise CheckpointError(
                    f"{self._found.path}: ai-toolkit's DoRA with an alpha ({given:g}) that is not "
                    f"the rank ({rank}) is no weight decomposition: it scales the factors in one "
                    "of two places; it is not read"
                )
            return given / rank
        stored = {*self._names["A"], *self._names["hada_w1_a"], *self._names["lokr_w2_a"]}
        without = sorted(stored - set(self._alphas))
        raise CheckpointError(
            f"{self._found.path}: stores no alpha for {listing(without, 3)}, and the factor in "
            "front is alpha/rank; say the training's with --alpha; diffusers and sd-scripts take "
            f"the rank where a file has none ({rank} for {module})"
        )


def _is_adapter(found: Found) -> bool:
    return (
        found.file is not None
        and not found.config
        and any(map(contents.is_adapters, found.tensors))
    )


def _is_flat(found: Found) -> bool:
    """Tell whether no module's path has dots. PEFT's names of factors never have such paths."""
    signs = [name for name in found.tensors if contents.is_adapters(name)]
    return not any("." in contents.module_of(n) or n.endswith(".lora_A.weight") for n in signs)


def _is_of_images(found: Found) -> bool:
    """Tell whether names are of a pipeline's parts, or spelled as only such adapters spell them."""
    assert found.file is not None
    return found.file.name.startswith("pytorch_lora_weights") or any(
        split_word(name)[0] or name.endswith(_TELLING) for name in found.tensors
    )


_TELLING = (
    ".alpha",
    ".dora_scale",
    ".magnitude",
    ".lora.down.weight",
    ".lora_linear_layer.down.weight",
    "_lora.down.weight",
    ".diff",
)


def _configs(found: Found) -> dict[str, dict[str, Any]]:
    """Give PEFT's configuration of each part, which recent files have in their metadata."""
    configs: dict[str, dict[str, Any]] = {}
    try:
        stored = json.loads(found.tensors.metadata.get(_METADATA, "{}"))
    except ValueError:
        raise CheckpointError(
            f"{found.path}: {_METADATA} in its header is no JSON; copy the file again"
        ) from None
    for key, value in stored.items():
        part, _, field = key.partition(".")
        configs.setdefault(part, {})[field] = value
    return configs


def _of_config(found: Found, config: Mapping[str, Any], path: str, rank: int) -> float:
    """Give the factor s as PEFT's configuration of a part has it."""
    initialiser = config.get("init_lora_weights")
    if initialiser not in HARMLESS:
        raise CheckpointError(
            f"{found.path}: {_METADATA} has init_lora_weights {initialiser!r}, which changes the "
            "base weight before training; convert the adapter to a plain LoRA and compare that"
        )
    of_part = Found(found.path, found.given)
    of_part.config = config
    declared, alpha = rank_and_alpha(of_part, path, rank)
    if declared != rank:
        raise CheckpointError(
            f"{found.path}: {path} has rank {rank} and in {_METADATA} {declared:g}; tensors and "
            "metadata must come from one training"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
