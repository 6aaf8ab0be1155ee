"""What stands in ``statistics.csv`` and ``comparisons.csv``, described here alone."""

from __future__ import annotations

ALL = "all"

# What is estimated with an interval, and what it is.
ESTIMATES: dict[str, str] = {
    "pearson_r": "Pearson's correlation of ΔM and ΔD over all points, −1 to 1",
    "slope": "slope of the least-squares line of ΔM on ΔD, in units of the weight",
    "spearman_r": "Spearman's rank correlation of ΔM and ΔD, −1 to 1",
    "theil_sen_slope": "median slope of the lines through two points each (Theil–Sen)",
    "within_layer_r": "correlation within each matrix of a layer, over its checkpoints, −1 to 1",
    "between_layer_r": "correlation of the layers' means over their checkpoints, −1 to 1",
    "within_step_r": "correlation within each checkpoint, over the layers, −1 to 1",
    "partial_r": "correlation after a straight line in the step is taken out of both, −1 to 1",
    "mixed_slope": "slope of ΔM on ΔD with a random intercept for each matrix of a layer",
}


def _with_intervals() -> dict[str, str]:
    columns = {}
    for name, meaning in ESTIMATES.items():
        columns[name] = f"{meaning}; empty where it has no meaning"
        columns[f"{name}_low"] = f"lower end of the 95 % interval of {name}; empty without one"
        columns[f"{name}_high"] = "its upper end"
        if name == "slope":
            columns["intercept"] = "ΔM of the least-squares line at ΔD = 0"
    return columns


# Statistics column → what it holds.
COLUMNS: dict[str, str] = {
    "run": "name of the run; empty where the runs of a method stand together",
    "method": "how it was trained",
    "runs": "number of runs",
    "matrix": "label of the matrices fitted, or 'all'",
    "per": "which axis the vectors are",
    "granularity": "what a vector is, as in the table",
    "n": "number of points: layers × checkpoints (× matrices × runs)",
    "n_below_floor": "points under three times their floor; among n, unless left out on request",
    "clusters": "number of layers, which the intervals resample",
    **_with_intervals(),
    "null": "which random updates of the measured size r and slope are set beside; empty for none",
    "null_r_low": "lower end of the band that holds Pearson's r of 95 % of the random updates",
    "null_r_high": "its upper end",
    "null_p": "two-sided p of pearson_r among the random updates, over 0 to 1",
    "null_between_r_low": "lower end of the band of 95 % of the random updates' between_layer_r",
    "null_between_r_high": "its upper end",
    "null_between_p": "two-sided p of between_layer_r among the random updates, over 0 to 1",
    "null_slope_low": "lower end of the band that holds the slope of 95 % of the random updates",
    "null_slope_high": "its upper end",
    "null_slope_p": "two-sided p of slope among the random updates, over 0 to 1",
    "reading": "what r says, in words",
}

# Comparison column → what it holds.
COMPARISON_COLUMNS: dict[str, str] = {
    "run_a": "name of the first run; empty where the runs of a method stand together",
    "run_b": "name of the second",
    "method_a": "how the first was trained",
    "method_b": "how the second was trained",
    "matrix": "label of the matrices compared, or 'all'",
    "per": "which axis the vectors are",
    "granularity": "what a vector is, as in the table",
    "matched": "which checkpoints are compared: 'all', same 'step', or same range of 'update norm'",
    "n_a": "number of points of the first",
    "n_b": "number of points of the second",
    "clusters": "number of layers that both have",
    "r_difference": "Pearson's r of the first minus that of the second, −2 to 2",
    "r_difference_low": "lower end of its 95 % interval; empty without one",
    "r_difference_high": "its upper end",
    "slope_difference": "slope of the first minus that of the second, in units of the weight",
    "slope_difference_low": "lower end of its 95 % interval; empty without one",
    "slope_difference_high": "its upper end",
    "note": "why a value is empty, or what it rests on",
}
