"""What lies at a place, looked at once for all layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wda.checkpoints import gguf
from wda.checkpoints.composed import of_mlx_expert, with_composed
from wda.checkpoints.containers import container_in, open_container
from wda.checkpoints.fused_forms import unstacked
from wda.checkpoints.given import NOTHING_GIVEN, Given
from wda.checkpoints.quantised import dequantised
from wda.checkpoints.tensors import Tensors, first_file, is_index, read_json
from wda.places import Place
from wda.remote import RemotePlace
from wda.rows import Lazy

CONFIG_FILE = "adapter_config.json"

# The names that weights go by in folders, adapters' first: where a folder has several of them,
# whole models lie beside adapters as what they were merged into or made from.
ADAPTER_FILES = (
    "adapter_model.pt",
    "lit_model.pth.lora",
    "model_state_dict.safetensors",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapters.safetensors",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model_fsdp.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "lit_model.pth",
)
ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pth.lora", ".gguf")


class Found:
    """What lies at a place. Layouts look at it in turn, and it is opened once.

    Parameters
    ----------
    path : Place
        A folder or a weight file.
    given : Given
        What the user says of it.
    """

    def __init__(self, path: Place, given: Given = NOTHING_GIVEN) -> None:
        self.path, self.given = path, given

    @Lazy
    def is_folder(self) -> bool:
        """Whether it is a folder rather than one file."""
        return self.path.is_dir()

    @property
    def folder(self) -> Place:
        """The folder, or that of the file."""
        return self.path if self.is_folder else self.path.parent

    @Lazy
    def file(self) -> Place | None:
        """The file with its weights, or with the index of their shards."""
        if not self.is_folder:
            known = self.path.name.endswith(ENDINGS) or is_index(self.path)
            return self.path if known else None
        return self.has(*ADAPTER_FILES, *WEIGHT_FILES) or container_in(self.folder)

    def has(self, *names: str) -> Place | None:
        """Give the first of these files that the folder has."""
        return first_file(self.folder, *names)

    @Lazy
    def config(self) -> Mapping[str, Any]:
        """The ``adapter_config.json`` beside the weights; empty where there is none."""
        return self.json(CONFIG_FILE)

    def json(self, name: str) -> Mapping[str, Any]:
        """Read a JSON file of the folder; empty where there is none."""
        file = self.has(name)
        return {} if file is None else read_json(file)

    def with_config(self, config: Mapping[str, Any]) -> Found:
        """Give the same with a configuration, where it has none."""
        other = Found(self.path, self.given)
        other.__dict__.update(self.__dict__, config=config)
        return other

    @Lazy
    def tensors(self) -> Tensors:
        """Its tensors by name; none where no weight file is found."""
        return self._read[0]

    @property
    def quantised(self) -> str | None:
        """How its weights are packed: ``nf4``, ``awq``, …; None where they are what they seem."""
        return self._read[1]

    @Lazy
    def _read(self) -> tuple[Tensors, str | None]:
        if self.file is None:
            return Tensors({}, self.path), None
        tensors = open_container(self.file)
        if self.file.suffix == gguf.ENDING:
            return tensors, gguf.packed_as(tensors)
        composed = with_composed(tensors, lambda: self.json("config.json"))
        floating, scheme = dequantised(composed, self.quantisation, self.path)
        return unstacked(floating, of_mlx_expert), scheme

    def quantisation(self) -> Mapping[str, Any]:
        """Tell what the model's configuration says of its quantisation."""
        config = self.json("config.json")
        return (
            config.get("quantization_config")
            or config.get("quantization")
            or self.json("quantize_config.json")
        )

    @property
    def listable(self) -> bool:
        """Whether its folder can be listed, which a web server's cannot."""
        return not isinstance(self.folder, RemotePlace) or self.folder.listable
