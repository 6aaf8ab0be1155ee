"""What an adapter is: a typed model that a recipe carries and a saved adapter repeats."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class AdapterConfig(BaseModel):
    """An adapter's kind, size and place."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["lora", "rslora", "dora", "magnitude"] = Field(
        description="Which adapter; `magnitude` trains DoRA's m alone, in the direction of W0."
    )
    rank: int = Field(default=8, ge=1, description="r, the rank of B·A.")
    alpha: float = Field(
        default=16.0, gt=0, description="α; the update is scaled by s = α/r, for rsLoRA by α/√r."
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
    full_gradient: bool = Field(
        default=False,
        description="DoRA: also differentiate through ‖W0 + s·B·A‖ (Eq. 6) instead of holding it "
        "constant (Eq. 11, Sec. 4.3).",
    )

    @model_validator(mode="after")
    def _magnitudes_have_directions(self) -> Self:
        if self.magnitudes and self.method != "dora":
            raise ValueError(
                f"magnitudes: are trained beside the directions of dora, not of {self.method}; "
                "choose method: dora, or method: magnitude with these as targets"
            )
        return self

    @property
    def scaling(self) -> float:
        """S = α/r, or α/√r."""
        return self.alpha / (math.sqrt(self.rank) if self.method == "rslora" else self.rank)

    @property
    def decomposed(self) -> bool:
        """Whether there are magnitudes."""
        return self.method in ("dora", "magnitude")
