"""Methods that have no reader of their own: peft itself merges them, where it is installed.

It is given a skeleton, a model of nothing but the adapted modules, in which one has its weight at a
time. What depends on the shapes of all modules is as it was in training; what is drawn again is
drawn with the seed that the configuration keeps.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wda.checkpoints.factors import PREFIX
from wda.checkpoints.forms import Form, Stored, Wanted, Whole
from wda.checkpoints.found import CONFIG_FILE, Found
from wda.checkpoints.peft.contents import WHOLE, Contents
from wda.checkpoints.tensors import Tensors
from wda.errors import CheckpointError, MissingExtraError, listing
from wda.naming import align, find_matrices, pick
from wda.updates import Computed, Some

if TYPE_CHECKING:
    from wda.checkpoints.full import FullCheckpoint

# Variants of LoRA that have tensors or weights of their own.
_VARIANTS = ("use_bdlora", "kasa_config")

# Methods that put networks beside the weights, which are wda's own, or keys before the texts.
_BESIDE = ("SERIES", "PARALLEL", "PREFIX_TUNING")

# Methods whose update of a module follows from its tensors, its weight and the shapes of all
# modules. What others draw or decompose depends on the order of the modules or on all weights.
_BY_MODULE = (
    *("ADAMSS", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "LORA"),
    *("MISS", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING"),
    *("VBLORA", "WAVEFT"),
)

# What a skeleton must not inherit: the choice of its modules, and what is trained whole.
_OF_THE_MODEL = {
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    "task_type": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "revision": None,
}

# peft draws numbers while it builds a layer; two threads would draw each other's.
_ALONE = threading.Lock()


def is_variant(config: Mapping[str, Any]) -> bool:
    """Tell whether a LoRA configuration asks for what only peft merges."""
    return any(config.get(field) for field in _VARIANTS)


@dataclass(frozen=True)
class Skeleton:
    """An adapter that peft merges, module by module.

    Attributes
    ----------
    found : Found
        The adapter.
    modules : tuple of str
        The modules it adapts.
    names : tuple of str
        Its tensors, without modules that were trained whole.
    """

    found: Found
    modules: tuple[str, ...]
    names: tuple[str, ...]

    def merge(self, module: str, w0: Tensor, turned: bool, base: FullCheckpoint) -> Tensor:
        """Give Wt of a module in float64, shaped as it is stored.

        Parameters
        ----------
        module : str
            The module.
        w0 : Tensor
            Its weight, shaped as it is stored.
        turned : bool
            Whether that is (in_features, out_features).
        base : FullCheckpoint
            The base, for the shapes of the other modules.
        """
        import peft  # noqa: PLC0415 - an extra

        with _ALONE, torch.random.fork_rng():
            model = nn.Module()
            for name, layer in self._layers(base).items():
                _put(model, name, layer)
            _put(model, module, _layer(w0.clone(), turned))
            adapted = peft.get_peft_model(model, self._config())
            state = {name: self.found.tensors.read(name, again=True) for name in self.names}
            loaded = peft.set_peft_model_state_dict(adapted, state)
            self._check(loaded.unexpected_keys)
            layer = adapted.base_model.model.get_submodule(module)
            for other in self.modules:
                if other != module:
                    unused = adapted.base_model.model.get_submodule(other).get_base_layer()
                    unused.weight = nn.Parameter(torch.empty(0))
            adapted.double().eval()
            with torch.no_grad():
                layer.merge()
            merged: Tensor = layer.get_base_layer().weight.detach()
            return merged

    def _layers(self, base: FullCheckpoint) -> dict[str, nn.Module]:
        """Give an empty layer for every module, of the base's shape."""
        rename = align(self.modules, base.modules)
        shapes = base.tensors.shapes_of(f"{rename(module)}.weight" for module in self.modules)
        said = bool(self.found.config.get("fan_in_fan_out"))
        matrices = find_matrices(shapes, lambda _module, _shape: said)
        turned = {matrix.module for matrix in matrices if matrix.stored_transposed}
        return {
            # Zeros take no memory until they are used.
            module: _layer(
                torch.zeros(shapes[f"{rename(module)}.weight"]), rename(module) in turned
            )
            for module in self.modules
        }

    def _config(self) -> Any:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: PLC0415 - an extra

        said = {**self.found.config, **_OF_THE_MODEL, "target_modules": list(self.modules)}
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[said.pop("peft_type")]
        known = {field.name for field in dataclasses.fields(kind) if field.init}
        return kind(**{name: value for name, value in said.items() if name in known})

    def _check(self, unexpected: list[str]) -> None:
        if unexpected:
            raise CheckpointError(
                f"{self.found.path}: peft {importlib.metadata.version('peft')} does not know what "
                f"these tensors are: {listing(unexpected, 4)}; install the version that trained "
                "the adapter"
            )


@dataclass(frozen=True)
class MergedByPeft(Form):
    """What peft's own merge makes of W0.

    Attributes
    ----------
    skeleton : Skeleton
        The adapter.
    module : str
        The module of it.
    """

    skeleton: Skeleton
    module: str

    needs_whole = True

    @property
    def words(self) -> str:  # type: ignore[override]
        """Who merges it."""
        return f"merged by peft {importlib.metadata.version('peft')}"

    @property
    def tensors(self) -> Tensors:
        """The adapter's tensors."""
        return self.skeleton.found.tensors

    @property
    def parts(self) -> tuple[Stored, ...]:
        """All of the adapter's tensors: methods share some among their modules."""
        return tuple(Stored(self.tensors, name) for name in self.skeleton.names)

    @property
    def shape(self) -> tuple[None, None]:
        """What only the base knows."""
        return None, None

    @property
    def told(self) -> tuple[object, ...]:
        """The version of peft and the configuration, too."""
        return *super().told, self.words, sorted(self.skeleton.found.config.items(), key=str)

    def update(self, wanted: Wanted) -> Computed:
        """Let peft merge the whole matrix, and give the wanted rows."""
        matrix = wanted.matrix.whole
        w0 = wanted.whole_w0()
        shape = wanted.base.tensors[f"{matrix.module}.weight"].shape
        stored = (w0.T if matrix.stored_transposed else w0).reshape(shape)
        merged = self.skeleton.merge(
            self.module, stored, matrix.stored_transposed, wanted.base
        ).flatten(1)
        wt = pick(merged.T if matrix.stored_transposed else merged, wanted.stored_rows)
        dtype = self.tensors.read(self.skeleton.names[0], again=True).dtype

        def form(rows: Tensor, some: Some) -> Tensor:
            return wt[some] - rows

        return Computed(wanted.shape, dtype, form)

    def held_bytes(self, vectors: int, features: int) -> int:
        """Give the memory of the merged matrix and of what peft makes of it on the way."""
        return 4 * 8 * vectors * features


def read(found: Found) -> Contents:
    """Let peft merge an adapter.

    Raises
    ------
    MissingExtraError
        When peft is not installed.
    CheckpointError
        When peft does not know the method, or the method has no weight to merge.
    """
    kind = str(found.config.get("peft_type"))
    prefix = _prefix(found, kind)
    modules, names, copies, forms = set[str](), [], [], dict[str, Form]()
    for name in found.tensors:
        module = name.partition(f".{prefix}")[0].removeprefix(PREFIX).removesuffix(".base_layer")
        if f".{prefix}" in name and name.startswith(PREFIX):
            modules.add(module)
        if f".{prefix}" in name or not name.startswith(PREFIX):
            names.append(name)
        elif name.endswith(".base_layer.weight"):
            copies.append(name)
        elif WHOLE.search(name) and len(found.tensors[name].shape) > 1:
            whole = WHOLE.sub("", name).removeprefix(PREFIX)
            forms[whole] = Whole(Stored(found.tensors, name))
    if not modules:
        raise CheckpointError(
            f"{found.path}: no tensor of a {kind} adapter ({prefix}…); found "
            f"{listing(found.tensors, 4)}"
        )
    skeleton = Skeleton(found, tuple(sorted(modules)), tuple(names))
    forms |= {module: MergedByPeft(skeleton, module) for module in skeleton.modules}
    return Contents(forms, kind.lower(), [*names, *copies])


def _prefix(found: Found, kind: str) -> str:
    """Give what the names of a method's tensors begin with."""
    if kind in _BESIDE:
        raise CheckpointError(
            f"{found.folder / CONFIG_FILE}: {kind.lower()} adapters stand beside the weights and "
            "change none of them, so there is nothing to compare"
        )
    try:
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING  # noqa: PLC0415 - an extra
    except ImportError:
        raise MissingExtraError(
            f"{found.path}: only peft itself can merge {kind} adapters; "
            "try: pip install 'weight-decomposition-analysis[peft]'"
        ) from None
    if (tuner := PEFT_TYPE_TO_TUNER_MAPPING.get(kind)) is None:
        raise CheckpointError(
            f"{found.folder / CONFIG_FILE}: peft {importlib.metadata.version('peft')} knows no "
            f"peft_type {kind!r}; install the version that trained the adapter"
        )
    if kind not in _BY_MODULE:
        raise CheckpointError(
            f"{found.folder / CONFIG_FILE}: peft_type {kind!r} is not read: either no weight "
            "changes in a way that is the same for every text, or what one module's update is "
            "follows from the whole model; if peft can merge it, compare the merged model"
        )
    return str(tuner.prefix)


def _layer(weight: Tensor, turned: bool) -> nn.Module:
    """Give a layer with a weight."""
    shape = weight.shape
    if turned:
        from transformers.pytorch_utils import Conv1D  # noqa: PLC0415 - comes with peft

        layer: nn.Module = Conv1D(shape[1], shape[0])
    elif len(shape) == 2:
        layer = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    else:
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 3]
        layer = kind(shape[1], shape[0], shape[2:], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer where its path says."""
    *parents, last = path.split(".")
    for parent in parents:
        if not hasattr(model, parent):
            model.add_module(parent, nn.Module())
        model = model.get_submodule(parent)
    setattr(model, last, layer)
