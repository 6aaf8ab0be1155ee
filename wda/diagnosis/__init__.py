"""What is wrong or suspicious in a checkpoint: measures of every matrix, and checks of them."""

from __future__ import annotations

from wda.diagnosis.checks import Finding
from wda.diagnosis.diagnose import diagnose

__all__ = ["Finding", "diagnose"]
