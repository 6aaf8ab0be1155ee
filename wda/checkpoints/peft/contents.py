"""What a reader finds in a folder of peft's, and what all readers ask of its configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wda.checkpoints.forms import Form
from wda.checkpoints.found import CONFIG_FILE, Found
from wda.errors import CheckpointError, listing

# A weight that was trained whole; the state dict of a PeftModel says so within its name.
WHOLE = re.compile(r"\.modules_to_save\.[^.]+(?=\.)|\.weight$")


@dataclass(frozen=True)
class Contents:
    """What a reader finds.

    Attributes
    ----------
    forms : mapping
        Module → how its change is stored.
    method : str
        How it was trained.
    accounted : iterable of str
        Names of tensors outside the forms that need none; see :class:`Adapter`.
    """

    forms: Mapping[str, Form]
    method: str
    accounted: Iterable[str] = ()


def require(found: Found, *fields: str) -> Mapping[str, Any]:
    """Give the configuration, after making sure that it has these fields.

    Raises
    ------
    CheckpointError
        Naming those that are missing.
    """
    absent = [field for field in fields if found.config.get(field) is None]
    if absent:
        raise CheckpointError(
            f"{found.folder / CONFIG_FILE}: {listing(absent)} missing; the scaling needs it"
        )
    return found.config
