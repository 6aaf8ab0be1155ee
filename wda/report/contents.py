"""What a report is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import pandas as pd

from wda.draws import Draws

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Finding(Protocol):
    """What a check of a checkpoint found, as `wda doctor` tells it."""

    @property
    def verdict(self) -> str:
        """How it is judged: ok, suspicious or wrong."""

    @property
    def check(self) -> str:
        """What was looked at."""

    @property
    def number(self) -> str:
        """What was measured."""

    @property
    def advice(self) -> str:
        """What to do; empty where all is well."""


@dataclass(frozen=True)
class ReportContents:
    """Everything that stands on a report's page; what is left out has no section there.

    Attributes
    ----------
    title : str
        The page's heading.
    table : pandas.DataFrame
        One row per run, checkpoint and matrix; columns in :data:`wda.table.COLUMNS`.
    statistics : pandas.DataFrame
        The fits that belong to it; columns in :data:`wda.statistics.COLUMNS`.
    comparisons : pandas.DataFrame or None
        The differences between runs.
    draws : Draws or None
        Random updates of the measured size, row by row as the table.
    provenance : mapping
        How the table was made.
    notes : sequence of str
        What was left out and why.
    findings : mapping of str to sequence of Finding
        By run, what the checks of its newest checkpoint found.
    figures : mapping of str to matplotlib.figure.Figure
        Static figures by name, such as ``scatter``.
    """

    title: str
    table: pd.DataFrame
    statistics: pd.DataFrame
    comparisons: pd.DataFrame | None = None
    draws: Draws | None = None
    provenance: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()
    findings: Mapping[str, Sequence[Finding]] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
