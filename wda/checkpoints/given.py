"""What a user says of a checkpoint that it does not say itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Given:
    """What a user says of a checkpoint that it does not say itself; None where nothing is said.

    Attributes
    ----------
    alpha : float or None
        α of the scaling, where the layout does not store it.
    enabled : tuple of str or None
        Which parts of a fused projection its factors change: labels such as ``query``.
    axis : {"output", "input"} or None
        What a magnitude has one number of, where names and shapes do not tell.
    initial : str or None
        Location of the adapter as it was before its training, where the initialiser took that off
        W0 and it cannot be computed again.
    trained_on : str or None
        Location of the quantised model that it was trained on, where W0 is to be the original one.
    """

    alpha: float | None = None
    enabled: tuple[str, ...] | None = None
    axis: Literal["output", "input"] | None = None
    initial: str | None = None
    trained_on: str | None = None


NOTHING_GIVEN = Given()
