"""Estimates against scipy, statsmodels and plain sums; what is said where nothing can be fitted."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from clouds import Population, table_of_clouds
from scipy import stats
from statsmodels.regression.linear_model import GLS, OLS
from statsmodels.regression.mixed_linear_model import MixedLM, MixedLMParams

from wda.draws import Draws
from wda.errors import TableError
from wda.statistics import COLUMNS, ESTIMATES, compute_statistics, fit_line
from wda.statistics import ends as written
from wda.statistics.clouds import make_cloud
from wda.statistics.mixed_model import fit_mixed, unit_sums
from wda.table import make_table

CLOUD = Population()


def row_of(
    table: pd.DataFrame, matrix: str = "query", run: str = "a", **options: object
) -> pd.Series:
    statistics = compute_statistics(table, **options)
    return statistics[(statistics["run"] == run) & (statistics["matrix"] == matrix)].iloc[0]


def one_run(layers: int = 8, seed: int = 0, population: Population = CLOUD) -> pd.DataFrame:
    cloud = population.draw(layers, np.random.default_rng(seed))
    return table_of_clouds({("a", "lora", "query"): cloud})


def two_matrices(layers: int = 8, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    return table_of_clouds(
        {("a", "lora", matrix): CLOUD.draw(layers, random) for matrix in ("query", "value")}
    )


def table_of(points: dict[tuple[str, str], list[tuple[float, float]]]) -> pd.DataFrame:
    return make_table(
        {
            "run": run,
            "method": "lora",
            "step": i,
            "module": f"layer.{i}",
            "layer": i,
            "matrix": matrix,
            "per": "output",
            "out_features": 3,
            "in_features": 4,
            "n_vectors": 3,
            "delta_d": x,
            "delta_m": y,
            "n_undirected": 0,
            "dtype": "float32",
            "base_dtype": "float32",
        }
        for (run, matrix), cloud in points.items()
        for i, (x, y) in enumerate(cloud)
    )


def centred_r(table: pd.DataFrame, groups: list[str]) -> float:
    both = table[["delta_d", "delta_m"]]
    rest = both - both.groupby([table[name] for name in groups]).transform("mean")
    return stats.pearsonr(rest["delta_d"], rest["delta_m"]).statistic


# ------------------------------------------------------------------------------ the estimates


def test_fit_agrees_with_numpy_at_any_scale() -> None:
    rng = np.random.default_rng(0)
    for scale in (1.0, 1e-9, 1e6):
        x = scale * rng.random(24)
        y = 3.7 * x + 0.2 * scale * rng.standard_normal(24)
        fit = fit_line(x, y)
        slope, intercept = np.polyfit(x, y, 1)
        assert fit.pearson_r == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-12)
        assert fit.slope == pytest.approx(slope, rel=1e-10)
        assert fit.intercept == pytest.approx(intercept, rel=1e-8)


def test_one_row_per_label_and_one_for_all() -> None:
    query = [(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]
    value = [(0.0, 9.0), (1.0, 7.0), (2.0, 5.0)]
    statistics = compute_statistics(table_of({("a", "query"): query, ("a", "value"): value}))
    assert list(statistics.columns) == list(COLUMNS)
    assert list(statistics["matrix"]) == ["query", "value", "all"]
    assert list(statistics["n"]) == [3, 3, 6]
    assert statistics["slope"].tolist() == pytest.approx([2, -2, 0], abs=1e-12)
    assert statistics["pearson_r"].tolist() == pytest.approx([1, -1, 0], abs=1e-12)
    assert statistics["intercept"].tolist() == pytest.approx([1, 9, 5], abs=1e-12)


@pytest.mark.parametrize("matrix", ["query", "all"])
def test_pooled_estimates_are_scipys(matrix: str) -> None:
    table = two_matrices()
    row = row_of(table, matrix)
    points = table if matrix == "all" else table[table["matrix"] == matrix]
    x, y = points["delta_d"].to_numpy(), points["delta_m"].to_numpy()
    assert row["n"] == len(x)
    assert row["clusters"] == 8
    assert row["pearson_r"] == pytest.approx(stats.pearsonr(x, y).statistic, rel=1e-12)
    assert row["spearman_r"] == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-10)
    assert row["slope"] == pytest.approx(stats.linregress(x, y).slope, rel=1e-12)
    assert row["theil_sen_slope"] == pytest.approx(stats.theilslopes(y, x).slope, rel=1e-12)


@pytest.mark.parametrize("matrix", ["query", "all"])
def test_parts_of_r_are_correlations_of_what_is_left(matrix: str) -> None:
    table = two_matrices()
    row = row_of(table, matrix)
    points = table if matrix == "all" else table[table["matrix"] == matrix]
    means = points.groupby(["module", "matrix"], as_index=False)[["delta_d", "delta_m"]].mean()
    assert row["within_layer_r"] == pytest.approx(centred_r(points, ["module"]), rel=1e-10)
    assert row["between_layer_r"] == pytest.approx(centred_r(means, ["matrix"]), rel=1e-10)
    assert row["within_step_r"] == pytest.approx(centred_r(points, ["step", "matrix"]), rel=1e-10)
    step = np.column_stack([np.ones(len(points)), points["step"].to_numpy(float)])
    rest = [OLS(points[name].to_numpy(), step).fit().resid for name in ("delta_d", "delta_m")]
    assert row["partial_r"] == pytest.approx(stats.pearsonr(*rest).statistic, rel=1e-10)


def test_within_steps_counts_layers_that_miss_a_step() -> None:
    table = one_run().drop(index=[3, 8, 9, 17])
    row = row_of(table)
    assert row["within_step_r"] == pytest.approx(centred_r(table, ["step"]), rel=1e-10)


def test_mixed_slope_is_statsmodels_or_likelier() -> None:
    """MixedLM stops its search early: ours may differ by its tolerance, but is no less likely."""
    for seed in range(4):
        table = one_run(10, seed, Population(of_layers=1.0, of_points=0.3))
        row = row_of(table)
        x, y = table["delta_d"].to_numpy(), table["delta_m"].to_numpy()
        model = MixedLM(
            y, np.column_stack([np.ones_like(x), x]), groups=table["module"].to_numpy(str)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = model.fit()
        _, ratio = fit_mixed(unit_sums(make_cloud(table)))
        params = MixedLMParams.from_components(np.zeros(2), cov_re=np.array([[ratio]]))
        assert model.loglike(params) >= theirs.llf - 1e-6
        same = table["module"].to_numpy()[:, None] == table["module"].to_numpy()
        ours = GLS(y, model.exog, np.eye(len(x)) + ratio * same).fit()
        assert row["mixed_slope"] == pytest.approx(ours.params[1], rel=1e-8)
        assert row["mixed_slope"] == pytest.approx(theirs.fe_params[1], rel=0.05)


def test_mixed_slope_takes_the_intercepts_of_layers_out() -> None:
    """Layers far apart, each on a line of slope 2: between them the slope is −5."""
    rng = np.random.default_rng(0)
    cloud = Population(steps=6).draw(8, rng)
    x = cloud.layer * 10.0 + rng.random(len(cloud))
    y = -50.0 * cloud.layer + 2 * (x - 10.0 * cloud.layer) + 0.01 * rng.standard_normal(len(cloud))
    table = one_run(8, 0, Population(steps=6)).assign(delta_d=x, delta_m=y)
    row = row_of(table)
    assert row["slope"] == pytest.approx(-5, abs=0.1)
    assert row["mixed_slope"] == pytest.approx(2, abs=0.05)
    assert row["mixed_slope_low"] < 2 < row["mixed_slope_high"]


def test_large_clouds_draw_pairs_for_theil_sen() -> None:
    table = one_run(40, 0, Population(steps=20))
    x, y = table["delta_d"].to_numpy(), table["delta_m"].to_numpy()
    assert len(x) * (len(x) - 1) / 2 > 200_000
    row = row_of(table)
    width = row["theil_sen_slope_high"] - row["theil_sen_slope_low"]
    assert row["theil_sen_slope"] == pytest.approx(stats.theilslopes(y, x).slope, abs=width / 10)


def test_runs_of_a_method_stand_together_as_well() -> None:
    random = np.random.default_rng(0)
    clouds = {(run, method, "query"): CLOUD.draw(6, random) for run, method in
              [("a", "lora"), ("b", "lora"), ("c", "dora")]}  # fmt: skip
    table = table_of_clouds(clouds)
    statistics = compute_statistics(table)
    assert statistics["run"].fillna("").tolist() == ["a", "a", "b", "b", "c", "c", "", ""]
    both = statistics[statistics["run"].isna()].iloc[0]
    assert (both["method"], both["runs"], both["n"], both["clusters"]) == ("lora", 2, 48, 6)
    points = table[table["method"] == "lora"]
    means = points.groupby(["run", "module"], as_index=False)[["delta_d", "delta_m"]].mean()
    r = stats.pearsonr(points["delta_d"], points["delta_m"]).statistic
    assert both["pearson_r"] == pytest.approx(r, rel=1e-12)
    assert both["within_layer_r"] == pytest.approx(centred_r(points, ["run", "module"]), rel=1e-10)
    assert both["between_layer_r"] == pytest.approx(centred_r(means, ["run"]), rel=1e-10)
    assert both["within_step_r"] == pytest.approx(centred_r(points, ["run", "step"]), rel=1e-10)
    assert "over 6 layers of 2 runs" in both["reading"]


def test_the_order_of_rows_and_the_scale_change_nothing_else() -> None:
    table = two_matrices()
    expected = row_of(table, "all")
    shuffled = row_of(table.sample(frac=1, random_state=0), "all")
    scaled = row_of(table.assign(delta_m=1e-6 * table["delta_m"]), "all")
    for name in ESTIMATES:
        for column in (name, f"{name}_low", f"{name}_high"):
            unit = 1e-6 if "slope" in name else 1.0
            assert shuffled[column] == pytest.approx(expected[column], rel=1e-9), column
            assert scaled[column] == pytest.approx(unit * expected[column], rel=1e-6), column


# ------------------------------------------------------------------------- what is not determined


@pytest.mark.parametrize(
    ("cloud", "why"),
    [
        ([(1.0, 2.0)], "1 point with both"),
        ([(1.0, 2.0), (2.0, 3.0)], "2 points with both"),
        ([(1.0, 2.0), (1.0, 3.0), (1.0, 4.0)], "ΔD is the same at all points"),
        ([(np.nan, 2.0)] * 4, "0 points with both"),
    ],
    ids=["one point", "two points", "constant ΔD", "no direction"],
)
def test_what_is_not_determined_is_empty(cloud: list[tuple[float, float]], why: str) -> None:
    row = compute_statistics(table_of({("a", "query"): cloud})).iloc[0]
    assert row["n"] == sum(np.isfinite(x) for x, _ in cloud)
    assert row[["intercept", *ESTIMATES]].isna().all()
    assert row["reading"].startswith("no r: ") and why in row["reading"]


def test_constant_delta_m_has_a_slope_but_no_r() -> None:
    row = compute_statistics(table_of({("a", "query"): [(1, 2), (2, 2), (3, 2)]})).iloc[0]
    assert row["slope"] == 0
    assert np.isnan(row["pearson_r"])
    assert row["reading"] == "no r: ΔM is the same at all points"


def test_points_without_direction_are_left_out() -> None:
    cloud = [(0.0, 1.0), (1.0, 3.0), (np.nan, 50.0), (2.0, 5.0)]
    row = compute_statistics(table_of({("a", "query"): cloud})).iloc[0]
    assert (row["n"], row["slope"]) == (3, pytest.approx(2))


def test_missing_columns_and_rows_are_named() -> None:
    table = table_of({("a", "query"): [(1, 2)]})
    with pytest.raises(TableError, match="columns missing: delta_d, delta_m|delta_m, delta_d"):
        compute_statistics(table.drop(columns=["delta_m", "delta_d"]))
    with pytest.raises(TableError, match="no rows"):
        compute_statistics(table.iloc[:0])


def test_too_few_layers_have_estimates_but_no_interval() -> None:
    row = row_of(one_run(4))
    assert np.isfinite(row[list(ESTIMATES)].to_numpy(float)).all()
    ends = [f"{name}_{end}" for name in ESTIMATES for end in ("low", "high")]
    assert row[ends].isna().all()
    assert "over 4 layers of one run, fewer than the 5 that an interval takes" in row["reading"]
    assert np.isfinite(row_of(one_run(5))[ends].to_numpy(float)).all()


def test_one_step_has_nothing_within_layers() -> None:
    for step in (100, None):
        table = one_run(8, 0, Population(steps=1)).assign(step=step)
        row = row_of(table)
        assert row[["within_layer_r", "partial_r", "mixed_slope"]].isna().all()
        assert row["between_layer_r"] == pytest.approx(row["pearson_r"], rel=1e-10)
        assert row["within_step_r"] == pytest.approx(row["pearson_r"], rel=1e-10)
        assert "one step, so nothing is said of change over time" in row["reading"]


def test_other_axes_and_granularities_are_fitted_by_themselves() -> None:
    parts = [
        one_run(6, seed).assign(per=per, granularity=granularity)
        for seed, (per, granularity) in enumerate(
            [("output", "vector"), ("input", "vector"), ("output", "head")]
        )
    ]
    statistics = compute_statistics(pd.concat(parts, ignore_index=True))
    assert len(statistics) == 6
    for part in parts:
        kind = part.iloc[0]
        mine = statistics["per"].eq(kind["per"]) & statistics["granularity"].eq(kind["granularity"])
        row = statistics[mine].iloc[0]
        r = stats.pearsonr(part["delta_d"], part["delta_m"]).statistic
        assert row["pearson_r"] == pytest.approx(r, rel=1e-12)


def test_layers_of_encoder_and_decoder_and_modules_outside_are_told_apart() -> None:
    table = one_run(3)
    decoder = table.assign(module=table["module"].str.replace("model", "decoder"))
    outside = table[table["layer"] == 0].assign(layer=pd.NA, module="lm_head")
    row = row_of(pd.concat([table, decoder, outside], ignore_index=True))
    assert row["clusters"] == 3 + 3 + 1


# -------------------------------------------------------------------------------------- floors


def test_rows_below_their_floor_are_counted_and_left_out_on_request() -> None:
    table = one_run(8)
    floored = table["step"] == 100
    table["below_floor"] = floored.astype("boolean").where(table["layer"] > 0)  # NA: not known
    row, without = row_of(table), row_of(table, leave_out_floored=True)
    assert (row["n"], row["n_below_floor"]) == (32, 7)
    assert (without["n"], without["n_below_floor"]) == (25, 7)
    kept = table[~(floored & (table["layer"] > 0))]
    r = stats.pearsonr(kept["delta_d"], kept["delta_m"]).statistic
    assert without["pearson_r"] == pytest.approx(r, rel=1e-12)
    assert "7 points under three times their floor are among them" in row["reading"]
    assert "7 points under three times their floor are left out" in without["reading"]


def test_all_below_the_floor_leaves_nothing() -> None:
    row = row_of(one_run(6).assign(below_floor=True), leave_out_floored=True)
    assert (row["n"], row["clusters"]) == (0, 0)
    assert row["reading"] == "no r: all 24 points lie under three times their floor"


# ----------------------------------------------------------------------- random updates, readings


def drawn_like(table: pd.DataFrame, draws: int, seed: int = 0, null: str = "isotropic") -> Draws:
    rng = np.random.default_rng(seed)
    x = rng.random((len(table), draws)) + table["step"].to_numpy(float)[:, None] / 100
    y = x + rng.random((len(table), draws))
    return Draws(np.full(len(table), null), y, x)


def test_null_band_and_p_are_those_of_every_draw_by_itself() -> None:
    table = two_matrices(6)
    table.loc[5, "delta_d"] = np.nan
    draws = drawn_like(table, 60)
    for matrix in ("query", "value", "all"):
        row = row_of(table, matrix, draws=draws)
        mine = table["delta_d"].notna() & (table["matrix"].eq(matrix) | (matrix == "all"))

        def between(points: pd.DataFrame) -> list[float]:
            """Means of each module, less those of its label, correlated draw by draw."""
            found = []
            for i in range(60):
                drawn = {"x": draws.delta_d[points.index, i], "y": draws.delta_m[points.index, i]}
                means = points.assign(**drawn).groupby(["matrix", "module"])[["x", "y"]].mean()
                means -= means.groupby("matrix").transform("mean")
                found.append(means.corr().loc["x", "y"])
            return found

        fits = [stats.linregress(draws.delta_d[mine, i], draws.delta_m[mine, i]) for i in range(60)]
        for name, p, drawn, measured in (
            ("null_r", "null_p", [fit.rvalue for fit in fits], row["pearson_r"]),
            ("null_slope", "null_slope_p", [fit.slope for fit in fits], row["slope"]),
            ("null_between_r", "null_between_p", between(table[mine]), row["between_layer_r"]),
        ):
            band = np.percentile(drawn, [2.5, 97.5])
            assert row[[f"{name}_low", f"{name}_high"]].tolist() == pytest.approx(band, rel=1e-9)
            above = sum(value >= measured for value in drawn) + 1
            below = sum(value <= measured for value in drawn) + 1
            assert row[p] == pytest.approx(min(1, 2 * min(above, below) / 61))
        assert row["null"] == "isotropic"


def test_p_is_uniform_where_the_null_is_true() -> None:
    table = one_run(6)
    draws = drawn_like(table, 400)
    ps = []
    for i in range(200):
        measured = table.assign(delta_d=draws.delta_d[:, i], delta_m=draws.delta_m[:, i])
        rest = draws.delta_m[:, 200:], draws.delta_d[:, 200:]
        ps.append(_null_p(measured, Draws(draws.null, *rest)))
    assert stats.kstest(ps, "uniform").pvalue > 0.01
    assert min(ps) >= 2 / 201


def _null_p(table: pd.DataFrame, draws: Draws) -> float:
    from wda.statistics.nulls import null_band

    fit = fit_line(table["delta_d"].to_numpy(), table["delta_m"].to_numpy())
    return float(null_band(draws, make_cloud(table), fit._asdict())["null_p"])  # type: ignore[arg-type]


def test_draws_of_another_table_are_refused() -> None:
    table = one_run(6)
    with pytest.raises(TableError, match="draws: of 10 rows, but the table has 24"):
        compute_statistics(table, drawn_like(table.head(10), 5))


def test_several_ranks_are_called_so() -> None:
    table = one_run(6)
    draws = drawn_like(table, 20)
    mixed = Draws(np.where(table["layer"] < 3, "rank 8", "rank 16"), draws.delta_m, draws.delta_d)
    assert row_of(table, draws=mixed)["null"] == "several ranks"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: -x, "lies below the band of rank 8 random updates"),
        (lambda x: x, "lies above the band of rank 8 random updates"),
    ],
)
def test_readings_say_on_which_side_of_the_band(
    change: Callable[[np.ndarray], np.ndarray], words: str
) -> None:
    table = one_run(8)
    table["delta_m"] = change(table["delta_d"])
    row = row_of(table, draws=drawn_like(table, 200, null="rank 8"))
    assert words in row["reading"]
    assert f"(p {2 / 201:.2g}): not what chance gives" in row["reading"]
    low, high = written(row["null_between_r_low"], row["null_between_r_high"])
    side = words.split()[1]
    between = f"between layers {row['between_layer_r']:+.2f} lies {side} theirs, {low} to {high} (p"
    assert between in row["reading"]


def test_readings_say_what_is_no_more_than_chance() -> None:
    table = one_run(8)
    draws = drawn_like(table, 200)
    table = table.assign(delta_d=draws.delta_d[:, 0], delta_m=draws.delta_m[:, 0])
    reading = row_of(table, draws=draws)["reading"]
    assert "lies inside the band of isotropic random updates" in reading
    assert reading.count("no more than chance") == 1
    assert "is not set beside random updates" in row_of(table)["reading"]


def test_readings_tell_of_effects_of_opposite_sign() -> None:
    """Within layers both grow; between them the one that turns more grows less."""
    table = one_run(10, 0, Population(between=-0.95, growth=0.1, of_layers=0.1, of_points=0.01))
    row = row_of(table)
    assert row["within_layer_r"] > 0.5
    assert row["between_layer_r"] < -0.5
    ends = row["between_layer_r_low"], row["between_layer_r_high"]
    assert "between layers, of opposite sign" in row["reading"]
    assert f"[{ends[0]:+.2f}, {ends[1]:+.2f}] between layers" in row["reading"]
    unsure = row_of(one_run(6, 3, Population(between=0.0, of_points=0.02)))
    assert unsure["within_layer_r"] * unsure["between_layer_r"] < 0
    assert "signs differ, though not for certain" in unsure["reading"]
    agreeing = row_of(one_run(10, 0, Population(between=0.9, within=0.9)))
    assert "within layers" not in agreeing["reading"]
