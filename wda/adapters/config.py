"""What an adapter is: a typed model that a recipe carries and a saved adapter repeats."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class AdapterConfig(BaseModel):
    """An adapter's kind, size and place."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["lora", "dora"] = Field(description="Which adapter.")
    rank: int = Field(default=8, ge=1, description="r, the rank of B·A.")
    alpha: float = Field(default=16.0, gt=0, description="α; the update is scaled by s = α/r.")
    targets: list[str] = Field(
        default=["query", "value"],
        min_length=1,
        description="Labels (query), modules' last names (q_proj) or re:PATTERN on module paths.",
    )
    full_gradient: bool = Field(
        default=False,
        description="DoRA: also differentiate through ‖W0 + s·B·A‖ (Eq. 6) instead of holding it "
        "constant (Eq. 11, Sec. 4.3).",
    )

    @property
    def scaling(self) -> float:
        """S = α/r."""
        return self.alpha / self.rank
