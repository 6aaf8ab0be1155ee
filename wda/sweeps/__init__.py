"""A recipe with a grid → runs → one table of what they came to, and its figures."""

from wda.sweeps.grid import Planned, Sweep, load_runs, load_sweep
from wda.sweeps.plan import SweepPlan, plan_sweep
from wda.sweeps.sweep import SweepOutcome, run_sweep

__all__ = [
    "Planned",
    "Sweep",
    "SweepOutcome",
    "SweepPlan",
    "load_runs",
    "load_sweep",
    "plan_sweep",
    "run_sweep",
]
