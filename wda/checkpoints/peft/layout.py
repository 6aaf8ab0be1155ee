"""The layout of peft's folders: a configuration that names the method, and the method's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

from wda.checkpoints.adapter import Adapter
from wda.checkpoints.found import CONFIG_FILE, WEIGHT_FILES, Found
from wda.checkpoints.peft import lora, merged, methods, tokens
from wda.checkpoints.peft.contents import Contents
from wda.checkpoints.peft.experts import spelled_as
from wda.errors import CheckpointError
from wda.naming import align

if TYPE_CHECKING:
    from wda.checkpoints.full import FullCheckpoint

_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# What only an adapter's tensors are called, also in the state dict of a whole PeftModel.
_SIGNS = (".lora_", ".vera_", ".hada_", ".lokr_", ".oft_", ".boft_", ".ia3_", ".base_layer.")

_READERS: dict[str, Callable[[Found], Contents]] = {
    "LORA": lora.read,
    lora.PER_INPUT: lora.read,
    "ADALORA": methods.read_adalora,
    "VERA": methods.read_vera,
    "DVORA": methods.read_vera,
    "WEIGHTNORM": methods.read_weight_norm,
    "LOHA": methods.read_loha,
    "LOKR": methods.read_lokr,
    "OFT": methods.read_oft,
    "BOFT": methods.read_boft,
    "IA3": methods.read_ia3,
    "TRAINABLE_TOKENS": tokens.read,
}


class PeftCheckpoint(Adapter):
    """A folder with ``adapter_config.json`` and the tensors of a method that is read here."""

    layout = "PEFT adapter"
    evidence = "adapter_config.json with peft_type"

    config: Mapping[str, Any]

    @classmethod
    def open(cls, found: Found) -> Self | None:
        """Open an adapter folder."""
        if not found.config and _is_state_dict(found):
            found = lora.described(found)
        elif not found.is_folder or not found.config:
            return None
        else:
            _check_files(found)
        if (read := cls._reader(found)) is None:
            return None
        contents = read(found)
        base = found.config.get("base_model_name_or_path") or None
        checkpoint = cls(
            found, found.tensors, contents.forms, contents.method, contents.accounted, base
        )
        checkpoint.config = found.config
        return checkpoint

    @classmethod
    def _reader(cls, found: Found) -> Callable[[Found], Contents] | None:
        """Give what reads the method; None where only peft merges it."""
        if merged.is_variant(found.config):
            return None
        return _READERS.get(str(found.config.get("peft_type")))

    def names_in(self, base: FullCheckpoint) -> Mapping[str, str]:
        """Give the base's names, in which experts may go by others than in memory."""
        spelled = {module: spelled_as(module, base.modules) for module in sorted(self.modules)}
        rename = align(spelled.values(), base.modules)
        return {module: rename(name) for module, name in spelled.items()}

    def says_transposed(self, module: str, stored: tuple[int, int]) -> bool:
        """Tell whether ``fan_in_fan_out`` holds for a base matrix of this stored shape."""
        if module not in self.required or not self.config.get("fan_in_fan_out"):
            return False
        own = self.forms[module].shape[::-1]
        return all(n is None or n == of_base for n, of_base in zip(own, stored, strict=True))


class MergedPeftCheckpoint(PeftCheckpoint):
    """A folder of a method that peft itself has to merge."""

    layout = "PEFT adapter, merged by peft itself"

    @classmethod
    def _reader(cls, found: Found) -> Callable[[Found], Contents] | None:  # noqa: ARG003
        """Take any method."""
        return merged.read


def _check_files(found: Found) -> None:
    """Refuse a folder without an adapter, or with a whole model beside it."""
    in_model = found.file is not None and found.file.name in WEIGHT_FILES
    if found.file is None or (in_model and not any(_is_peft(name) for name in found.tensors)):
        raise CheckpointError(
            f"{found.path}: {CONFIG_FILE} without weights; expected {' or '.join(_FILES)}"
        )
    whole = found.has(*WEIGHT_FILES)
    if whole is not None and not in_model:
        raise CheckpointError(
            f"{found.path}: holds an adapter ({found.file.name}) and a whole model "
            f"({whole.name}), which may have the adapter merged into it already; move one of "
            "them away"
        )


def _is_state_dict(found: Found) -> bool:
    """Tell whether it is the state dict of a PeftModel, without a configuration."""
    return any("base_model.model." in name and ".lora_A." in name for name in found.tensors)


def _is_peft(name: str) -> bool:
    return any(sign in name for sign in _SIGNS)
