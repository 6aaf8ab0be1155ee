"""Table → fits: how ΔM goes with ΔD, how certain that is, and whether it is more than chance."""

from wda.statistics.columns import ALL, COLUMNS, COMPARISON_COLUMNS, ESTIMATES
from wda.statistics.comparing import compare_methods
from wda.statistics.fitting import compute_statistics
from wda.statistics.lines import Fit, fit_line
from wda.statistics.readings import correlation, ends
from wda.statistics.repetitions import mean_of_repetitions

__all__ = [
    "ALL",
    "COLUMNS",
    "COMPARISON_COLUMNS",
    "ESTIMATES",
    "Fit",
    "compare_methods",
    "compute_statistics",
    "correlation",
    "ends",
    "fit_line",
    "mean_of_repetitions",
]
