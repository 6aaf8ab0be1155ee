"""What an adapter is: a typed model that a recipe carries and a saved adapter repeats."""

from __future__ import annotations

import math
from typing import Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal[
    "lora",
    "rslora",
    "dora",
    "magnitude",
    "vera",
    "dvora",
    "weightnorm",
    "series",
    "parallel",
    "prefix",
]

# Which methods a field means something for; the others' fields mean something for all.
_BELONGS_TO: dict[str, tuple[Method, ...]] = {
    "rank": ("lora", "rslora", "dora", "vera", "dvora"),
    "alpha": ("lora", "rslora", "dora"),
    "dropout": ("lora", "rslora", "dora", "vera", "dvora"),
    "magnitudes": ("dora", "dvora"),
    "full_gradient": ("dora", "dvora"),
    "per": ("dora",),
    "bottleneck": ("series", "parallel"),
    "targets": tuple(method for method in get_args(Method) if method != "prefix"),
    "virtual_tokens": ("prefix",),
}


class AdapterConfig(BaseModel):
    """An adapter's kind, size and place."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method = Field(
        description="Which adapter; `magnitude` trains DoRA's m alone, in the direction of W0; "
        "`dvora` is DoRA whose direction VeRA updates; `weightnorm` trains m and all of V; "
        "`series` and `parallel` put a bottleneck after or beside a layer, `prefix` puts keys and "
        "values before every text; these three change no weight."
    )
    rank: int = Field(default=8, ge=1, description="r, the rank of B·A.")
    alpha: float = Field(
        default=16.0,
        gt=0,
        description="α; the update is scaled by s = α/r, for rsLoRA by α/√r. VeRA has none.",
    )
    targets: list[str] = Field(
        default=["query", "value"],
        min_length=1,
        description="Labels (query), modules' last names (q_proj) or re:PATTERN on module paths.",
    )
    magnitudes: list[str] = Field(
        default=[],
        description="DoRA: what m is trained of, where `targets` do not train the direction too, "
        "as in the paper's Table 6; named like `targets`.",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the input's features that A does not see in a training step.",
    )
    full_gradient: bool = Field(
        default=False,
        description="DoRA: also differentiate through ‖W0 + s·B·A‖ (Eq. 6) instead of holding it "
        "constant (Eq. 11, Sec. 4.3).",
    )
    per: Literal["output", "input"] = Field(
        default="output",
        description="DoRA: one m per output feature, as in the paper, or per input feature, as "
        "LyCORIS once had it.",
    )
    bottleneck: int = Field(
        default=256, ge=1, description="Series and Parallel: features of the bottleneck."
    )
    virtual_tokens: int = Field(
        default=30, ge=1, description="Prefix: how many keys and values each layer gets."
    )

    @model_validator(mode="after")
    def _fields_belong_to_the_method(self) -> Self:
        defaults = type(self).model_fields
        wrong = [
            name
            for name, methods in _BELONGS_TO.items()
            if self.method not in methods and getattr(self, name) != defaults[name].default
        ]
        if wrong:
            allowed = "; ".join(
                f"{name} belongs to {', '.join(_BELONGS_TO[name])}" for name in wrong
            )
            raise ValueError(f"{', '.join(wrong)}: cannot be set for {self.method}: {allowed}")
        return self

    @property
    def scaling(self) -> float:
        """S = α/r, or α/√r."""
        return self.alpha / (math.sqrt(self.rank) if self.method == "rslora" else self.rank)

    @property
    def decomposed(self) -> bool:
        """Whether there are magnitudes."""
        return self.method in ("dora", "dvora", "magnitude")

    @property
    def changes_weights(self) -> bool:
        """Whether there is a Wt; else modules are put beside the weights."""
        return self.method not in ("series", "parallel", "prefix")

    @property
    def shares_projections(self) -> bool:
        """Whether A and B are random and shared."""
        return self.method in ("vera", "dvora")
