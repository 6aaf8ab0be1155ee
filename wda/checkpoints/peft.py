"""LoRA and DoRA adapters as Hugging Face PEFT writes them.

Keys end in ``lora_A.weight`` (rank, in), ``lora_B.weight`` (out, rank) and, for DoRA,
``lora_magnitude_vector`` (out,), with or without ``.weight``. The factors have these shapes for
``Conv1D`` too, whose base weight is stored as (in, out).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Self

from wda.checkpoints.checkpoint import Checkpoint
from wda.checkpoints.full import WEIGHT_FILES
from wda.checkpoints.tensors import ALL, Tensors, first_file, open_tensors, read_json
from wda.errors import CheckpointError, listing
from wda.naming import Matrix, pick
from wda.places import Place
from wda.updates import Dense, LowRank, Update, WeightDecomposed

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."

# What a tensor is → how its name ends, after the module's path.
_ENDINGS = {
    "A": re.compile(r"\.lora_A\.weight$"),
    "B": re.compile(r"\.lora_B\.weight$"),
    "magnitude": re.compile(r"\.lora_magnitude_vector(\.weight)?$"),
    "frozen": re.compile(r"\.base_layer\.(weight|bias)$|\.bias$"),
    "whole": re.compile(r"\.weight$"),
}

# Initialisers that leave W0 as it was; others replace it, and W0 + s·B·A is not Wt.
_HARMLESS_INITIALISERS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

# Settings that change the algebra of the update or the meaning of its keys.
_REFUSED = (
    "layer_replication",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "alora_invocation_tokens",
)


class PeftCheckpoint(Checkpoint):
    """An adapter folder: ``adapter_config.json`` and the adapter's tensors."""

    layout = "PEFT adapter"

    def __init__(self, path: Place, config: Mapping[str, Any], tensors: Tensors) -> None:
        self.path = path
        self.config = config
        self.tensors = tensors
        self.method = "dora" if config.get("use_dora") else "lora"
        self.base = config.get("base_model_name_or_path") or None
        self._names, self.unread = _sort(tensors)
        self._check()
        self.required = frozenset(self._names["A"])
        # "whole" are modules trained whole beside the adapter (`modules_to_save`).
        self.modules = self.required | set(self._names["whole"])

    @classmethod
    def open(cls, path: Place) -> Self | None:
        """Open an adapter folder."""
        if not path.is_dir() or not (path / CONFIG_FILE).is_file():
            return None
        file = first_file(path, *ADAPTER_FILES)
        whole = first_file(path, *WEIGHT_FILES)
        if file is None:
            raise CheckpointError(
                f"{path}: {CONFIG_FILE} without weights; expected {' or '.join(ADAPTER_FILES)}"
            )
        if whole is not None:
            raise CheckpointError(
                f"{path}: holds an adapter ({file.name}) and a whole model ({whole.name}), which "
                "may have the adapter merged into it already; move one of them away"
            )
        return cls(path, read_json(path / CONFIG_FILE), open_tensors(file))

    def holds_all(self) -> bool:
        """Tell that an absent matrix is one the adapter leaves alone."""
        return False

    def stored_shape(self, module: str, matrix: Matrix) -> tuple[int, int]:
        """Give the shape of B·A, or of a whole weight beside it."""
        if module in self.required:
            return self._shape("B", module)[0], self._shape("A", module)[1]
        rows, features = self._shape("whole", module)
        return (features, rows) if matrix.stored_transposed else (rows, features)

    def update(self, module: str, matrix: Matrix, rows: slice | None = None) -> Update:
        """Give W0 + s·B·A, or its weight-decomposed form where there is a magnitude."""
        if module not in self.required:
            name = self._names["whole"][module]
            return Dense(self.tensors.read_matrix(name, matrix, rows))
        some = matrix.rows_of_stored(rows)
        # A serves all rows of all parts of a matrix, and is asked for again with each.
        a = self.tensors.read(self._names["A"][module], again=True)
        b = self.tensors.read(self._names["B"][module], rows=some)
        low_rank = LowRank(a, b, self.scaling(module))
        if module not in self._names["magnitude"]:
            return low_rank
        magnitude = self.tensors.read(self._names["magnitude"][module], again=True)
        return WeightDecomposed(low_rank, pick(magnitude.flatten(), some))

    def held_bytes(
        self, module: str, matrix: Matrix, rows: slice | None = None, moved: bool = False
    ) -> int:
        """Give the memory of the factors, which are widened to float64."""
        if module not in self.required:
            return super().held_bytes(module, matrix, rows, moved)
        share = len(range(*(rows or ALL).indices(matrix.shape[0])))
        rank, features = self._shape("A", module)
        return 8 * rank * (features + share)

    def meaning(self, module: str) -> tuple[object, ...] | None:
        """Give the scaling, beside what all layouts tell."""
        stored = super().meaning(module)
        return stored and (*stored, self.scaling(module) if module in self.required else None)

    def tensors_of(self, module: str) -> tuple[str, ...]:
        """Name the factors and the magnitude, or the whole weight beside the adapter."""
        kinds = ("A", "B", "magnitude") if module in self.required else ("whole",)
        return tuple(self._names[kind][module] for kind in kinds if module in self._names[kind])

    def says_transposed(self, module: str, stored: tuple[int, int]) -> bool:
        """Tell whether ``fan_in_fan_out`` holds for a base matrix of this stored shape."""
        if module not in self.required or not self.config.get("fan_in_fan_out"):
            return False
        return stored == (self._shape("A", module)[1], self._shape("B", module)[0])

    def scaling(self, module: str) -> float:
        """Give the factor s of a module: α/r, or α/√r for rsLoRA, with the module's own α and r."""
        rank = self._shape("A", module)[0]
        alpha = self._setting("alpha_pattern", module, "lora_alpha")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _setting(self, pattern_field: str, module: str, default_field: str) -> float:
        """Look a per-module setting up as PEFT does: the first pattern that fits the name's end."""
        for pattern, value in (self.config.get(pattern_field) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return float(self.config[default_field])

    def _shape(self, kind: str, module: str) -> tuple[int, ...]:
        return self.tensors[self._names[kind][module]].shape

    def _check(self) -> None:
        """Refuse what cannot be read right."""
        config_file = self.path / CONFIG_FILE
        if self.config.get("peft_type") != "LORA":
            raise CheckpointError(
                f"{config_file}: peft_type {self.config.get('peft_type')!r} is not read yet; "
                "'LORA' (LoRA, rsLoRA, DoRA) is"
            )
        absent = [field for field in ("r", "lora_alpha") if self.config.get(field) is None]
        if absent:
            raise CheckpointError(f"{config_file}: {listing(absent)} missing; the scaling needs it")
        initialiser = self.config.get("init_lora_weights")
        if initialiser not in _HARMLESS_INITIALISERS:
            raise CheckpointError(
                f"{config_file}: init_lora_weights {initialiser!r} changes the base weight before "
                "training, so W0 + s·B·A is not the trained weight; convert the adapter to a plain "
                "LoRA with peft's path_initial_model_for_weight_conversion and compare that"
            )
        refused = [field for field in _REFUSED if self.config.get(field)]
        if refused:
            raise CheckpointError(
                f"{config_file}: {listing(refused)} changes what the tensors mean and is not read "
                "yet; merge the adapter with peft and compare the merged model"
            )
        a, b = set(self._names["A"]), set(self._names["B"])
        if a != b:
            raise CheckpointError(
                f"{self.path}: lora_A and lora_B do not belong together; only one of the two "
                f"exists for {listing(sorted(a ^ b))}"
            )
        if not a:
            raise CheckpointError(
                f"{self.path}: no tensor ends in lora_A.weight; found {listing(self.tensors, 4)}"
            )
        self._check_ranks()
        self._check_magnitudes()

    def _check_ranks(self) -> None:
        wrong = []
        for module in sorted(self._names["A"]):
            shape_a, shape_b = self._shape("A", module), self._shape("B", module)
            if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1]:
                wrong.append(f"{module} (A {shape_a}, B {shape_b})")
            elif shape_a[0] != (rank := self._setting("rank_pattern", module, "r")):
                wrong.append(f"{module} (rank {shape_a[0]} in the file, {rank:g} in the config)")
        if wrong:
            raise CheckpointError(
                f"{self.path}: factors that do not fit each other or {CONFIG_FILE}: "
                f"{listing(wrong, 6)}; weights and config must come from one training"
            )

    def _check_magnitudes(self) -> None:
        declared, magnitudes = bool(self.config.get("use_dora")), self._names["magnitude"]
        if not declared and magnitudes:
            raise CheckpointError(
                f"{self.path}: has lora_magnitude_vector tensors but use_dora is not true in "
                f"{CONFIG_FILE}; set it if this is a DoRA adapter"
            )
        missing = sorted(set(self._names["A"]) - set(magnitudes)) if declared else []
        if missing:
            raise CheckpointError(
                f"{self.path}: use_dora is true but lora_magnitude_vector is missing for "
                f"{listing(missing)}; save the adapter again with its magnitudes, nothing stands "
                "in for them"
            )
        wrong = [
            f"{module} ({self._shape('magnitude', module)})"
            for module in sorted(magnitudes)
            if math.prod(self._shape("magnitude", module)) != self._shape("B", module)[0]
        ]
        if wrong:
            raise CheckpointError(
                f"{self.path}: a magnitude needs one number per output feature; wrong for "
                f"{listing(wrong, 6)}"
            )


def _sort(tensors: Tensors) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Sort an adapter's tensors: kind → module → tensor name, and the names that fit no kind."""
    names: dict[str, dict[str, str]] = {kind: {} for kind in _ENDINGS}
    unread = []
    for name, entry in tensors.items():
        kind = next((kind for kind, end in _ENDINGS.items() if end.search(name)), None)
        if kind is None or (kind == "whole" and len(entry.shape) != 2):
            unread.append(name)
        else:
            module = _ENDINGS[kind].sub("", name).removeprefix(PREFIX)
            names[kind][module] = name
    return names, tuple(unread)
