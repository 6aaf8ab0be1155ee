"""Resamples against loops that repeat points; intervals against what they have to cover."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from clouds import Population
from scipy import stats

from wda.statistics import moments
from wda.statistics.clouds import Cloud
from wda.statistics.intervals import difference, interval
from wda.statistics.mixed_model import fit_mixed, mixed_slope, unit_sums
from wda.statistics.moments import Estimate
from wda.statistics.resampling import _run_resamples, jackknife, layer_resamples, sample
from wda.statistics.theil_sen import theil_sen


def centred(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    return values - (np.bincount(group, values) / np.bincount(group))[group]


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    return float(stats.pearsonr(x, y).statistic)


def unit_means(cloud: Cloud) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first = np.unique(cloud.unit, return_index=True)[1]
    x, y = (np.bincount(cloud.unit, v) / np.bincount(cloud.unit) for v in (cloud.x, cloud.y))
    return x, y, cloud.label[first]


def between(cloud: Cloud) -> float:
    x, y, label = unit_means(cloud)
    return pearson(centred(x, label), centred(y, label))


def partial(cloud: Cloud) -> float:
    rest = [v - np.polyval(np.polyfit(cloud.step, v, 1), cloud.step) for v in (cloud.x, cloud.y)]
    return pearson(*rest)


# Layers that differ as normal numbers do, nearly: exp of little.
MILD = Population(of_layers=0.25, of_runs=0.0, of_points=0.12, growth=0.25)

# The same numbers as in wda.statistics.moments, from the points themselves.
PLAIN: dict[str, Callable[[Cloud], float]] = {
    "pearson_r": lambda c: pearson(c.x, c.y),
    "slope": lambda c: float(stats.linregress(c.x, c.y).slope),
    "spearman_r": lambda c: float(stats.spearmanr(c.x, c.y).statistic),
    "within_layer_r": lambda c: pearson(centred(c.x, c.unit), centred(c.y, c.unit)),
    "between_layer_r": between,
    "within_step_r": lambda c: pearson(centred(c.x, c.at_once), centred(c.y, c.at_once)),
    "partial_r": partial,
}
# Resamples keep the ranks of all points.
EXACT = [name for name in PLAIN if name != "spearman_r"]


def made(cloud: Cloud) -> dict[str, Estimate]:
    r, slope = moments.pooled(cloud)
    given = moments.given_step(cloud)
    assert given is not None
    return {
        "pearson_r": r,
        "slope": slope,
        "spearman_r": moments.ranked(cloud, stats.rankdata(cloud.x), stats.rankdata(cloud.y)),
        "within_layer_r": moments.within_layers(cloud),
        "between_layer_r": moments.between_layers(cloud),
        "within_step_r": moments.within_steps(cloud),
        "partial_r": given,
    }


def repeated(cloud: Cloud, u: np.ndarray, v: np.ndarray) -> Cloud:
    """Repeat every run u times and every layer v times, each time as another one."""
    takes = [
        np.flatnonzero((cloud.run == r) & (cloud.layer == c))
        for r in range(cloud.runs)
        for _ in range(int(u[r]))
        for c in range(cloud.layers)
        for _ in range(int(v[c]))
    ]
    copies = int(v.sum())
    run = np.concatenate([np.full(len(t), i // copies) for i, t in enumerate(takes)])
    layer = np.concatenate([np.full(len(t), i % copies) for i, t in enumerate(takes)])
    unit = np.concatenate([np.full(len(t), i) for i, t in enumerate(takes)])
    points = np.concatenate(takes)
    at_once = np.unique(np.stack([run, cloud.step[points]]), axis=1, return_inverse=True)[1]
    return Cloud(
        *(cloud.x[points], cloud.y[points], run, layer),
        *(unit, at_once.ravel(), run, cloud.step[points]),
    )


def thinned(cloud: Cloud, keep: np.ndarray) -> Cloud:
    return Cloud(**{f.name: getattr(cloud, f.name)[keep] for f in dataclasses.fields(cloud)})


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("name", EXACT)
def test_resamples_are_those_of_points_repeated_in_a_loop(name: str, runs: int) -> None:
    random = np.random.default_rng(0)
    cloud = Population().draw(7, random, runs)
    cloud = thinned(cloud, np.arange(len(cloud)) % 11 != 5)  # some layers miss some steps
    estimate = made(cloud)[name]
    assert estimate.value() == pytest.approx(PLAIN[name](cloud), rel=1e-10)
    v = layer_resamples(7)[:12]
    u = _run_resamples(runs, 12)
    totals = np.einsum("mbr,br->mb", estimate.totals(v), u)
    for got, one_u, one_v in zip(estimate.formula(totals) * estimate.unit, u, v, strict=True):
        assert got == pytest.approx(PLAIN[name](repeated(cloud, one_u, one_v)), rel=1e-9)


@pytest.mark.parametrize("name", EXACT)
def test_jackknife_is_that_of_a_loop(name: str) -> None:
    cloud = Population().draw(6, np.random.default_rng(1))
    estimate = made(cloud)[name]
    scale = np.arctanh if estimate.is_correlation else (lambda value: value / estimate.unit)
    values = np.array([scale(PLAIN[name](without(cloud, c))) for c in range(6)])
    error = np.sqrt(5 / 6 * ((values - values.mean()) ** 2).sum())
    assert sample(estimate).whole.of_layers[0] == pytest.approx(error**2, rel=1e-9)
    # And of a resample, in which a layer that was taken twice can be left out once.
    times = np.array([2.0, 0, 1, 1, 1, 1])
    again = repeated(cloud, np.ones(1), times)
    values = np.array([scale(PLAIN[name](without(again, c))) for c in range(6)])
    error = np.sqrt(5 / 6 * ((values - values.mean()) ** 2).sum())
    assert jackknife(estimate, np.ones((1, 1)), times[None]).of_layers[0] == pytest.approx(error**2)


def without(cloud: Cloud, layer: int) -> Cloud:
    left = thinned(cloud, cloud.layer != layer)
    numbered = {
        name: np.unique(getattr(left, name), return_inverse=True)[1] for name in ("unit", "layer")
    }
    return dataclasses.replace(left, **numbered)


def theil_sen_of(cloud: Cloud) -> float:
    return float(stats.theilslopes(cloud.y, cloud.x).slope)


def mixed_of(cloud: Cloud) -> float:
    return fit_mixed(unit_sums(cloud))[0] * float(cloud.y.std() / cloud.x.std())


@pytest.mark.parametrize(
    ("plain", "found", "least"),
    [(theil_sen_of, theil_sen, 1e-9), (mixed_of, mixed_slope, 1e-3)],  # of the search's tolerance
)
def test_intervals_of_slow_estimates_leave_out_each_layer_in_a_loop(
    plain: Callable[[Cloud], float],
    found: Callable[[Cloud], tuple[float, tuple[float, float]]],
    least: float,
) -> None:
    cloud = MILD.draw(7, np.random.default_rng(4))
    values = np.array([plain(without(cloud, layer)) for layer in range(7)])
    reach = stats.t.ppf(0.975, 6) * np.sqrt(6 / 7 * ((values - values.mean()) ** 2).sum())
    value, (low, high) = found(cloud)
    assert value == pytest.approx(plain(cloud), rel=least)
    assert (low, high) == pytest.approx((value - reach, value + reach), rel=least)


def test_errors_of_layers_and_runs_add_up() -> None:
    """A made estimate: the mean of row and column effects, whose variance is known."""
    random = np.random.default_rng(2)
    rows, columns = random.standard_normal((5, 1)), 2 * random.standard_normal((1, 9))
    sums = np.stack([rows + columns, np.ones((5, 9))])
    estimate = Estimate(sums, lambda s: s[0] / s[1], is_correlation=False)
    _, whole, drawn = sample(estimate)
    of_runs, of_layers = rows.var(ddof=1) / 5, columns.var(ddof=1) / 9
    of_cells = sums[0].var(ddof=1) / 45
    assert whole.of_layers[0] == pytest.approx(of_layers, rel=1e-9)
    assert whole.of_runs[0] == pytest.approx(of_runs - of_cells, rel=1e-9)
    # A studentised bootstrap of so smooth an estimate is close to Student's t, with the freedom of
    # both, by Satterthwaite.
    variance = of_layers + of_runs - of_cells
    freedom = variance**2 / (of_layers**2 / 8 + (of_runs - of_cells) ** 2 / 4)
    narrowest = 2 * stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    low, high = interval(estimate)
    assert narrowest * (1 - 1e-9) <= high - low <= 1.6 * narrowest
    assert len(drawn.estimate) == len(layer_resamples(9))


def test_intervals_are_no_narrower_than_students_and_the_same_every_time() -> None:
    cloud = Population().draw(8, np.random.default_rng(3))
    for estimate in made(cloud).values():
        ends = interval(estimate)
        found = sample(estimate).whole
        reach = stats.t.ppf(0.975, 7) * np.sqrt(found.of_layers[0])
        low, high = found.estimate[0] - reach, found.estimate[0] + reach
        if estimate.is_correlation:
            low, high = np.tanh([low, high])
        else:
            low, high = estimate.unit * low, estimate.unit * high
        assert ends.low <= low + 1e-12
        assert ends.high >= high - 1e-12
        assert ends == interval(estimate)


def test_a_perfect_line_has_no_width_but_an_interval() -> None:
    cloud = Population().draw(8, np.random.default_rng(3))
    line = dataclasses.replace(cloud, y=3 * cloud.x + 1)
    r, slope = map(interval, moments.pooled(line))
    assert r == pytest.approx((1, 1), abs=1e-9)
    assert slope == pytest.approx((3, 3), rel=1e-9)


# ----------------------------------------------------------------------------------- coverage


def truth(population: Population) -> dict[str, float]:
    """Give the estimates of a population: of so many layers that nothing is left to chance."""
    big = population.draw(40_000, np.random.default_rng(99))
    i, j = np.random.default_rng(98).integers(len(big), size=(2, 2_000_000))
    i, j = i[i != j], j[i != j]
    steep = float(np.median((big.y[i] - big.y[j]) / (big.x[i] - big.x[j])))
    mixed = fit_mixed(unit_sums(big))[0] * big.y.std() / big.x.std()
    exact = {name: of(big) for name, of in PLAIN.items()}
    return exact | {"mixed_slope": mixed, "theil_sen_slope": steep}


def coverage(population: Population, layers: int, tables: int) -> dict[str, float]:
    """Share of the intervals that hold the truth."""
    random = np.random.default_rng(layers)
    known = truth(population)
    held: dict[str, list[bool]] = {name: [] for name in known}
    for _ in range(tables):
        cloud = population.draw(layers, random)
        ends = {name: interval(estimate) for name, estimate in made(cloud).items()}
        ends["theil_sen_slope"] = theil_sen(cloud)[1]
        ends["mixed_slope"] = mixed_slope(cloud)[1]
        for name, (low, high) in ends.items():
            held[name].append(low <= known[name] <= high)
    return {name: float(np.mean(values)) for name, values in held.items()}


@pytest.mark.parametrize("layers", [6, 12])
def test_intervals_hold_the_truth(layers: int) -> None:
    """Of 300 tables: 95 % give or take three standard errors, and the conservative way of six."""
    shares = coverage(MILD, layers, 300)
    assert min(shares.values()) >= 0.90, shares
    assert max(shares.values()) <= 0.99, shares


@pytest.mark.slow
@pytest.mark.parametrize("layers", [6, 12, 32])
def test_intervals_hold_the_truth_in_92_to_98_of_100(layers: int) -> None:
    """And those of the slow estimates, of which only a jackknife is taken, in 91."""
    shares = coverage(MILD, layers, 1000)
    slow = [shares.pop(name) for name in ("theil_sen_slope", "mixed_slope")]
    assert 0.91 <= min(slow) <= max(slow) <= 0.98, slow
    assert 0.92 <= min(shares.values()) <= max(shares.values()) <= 0.98, shares


@pytest.mark.slow
@pytest.mark.parametrize("of_runs", [0.0, 0.12])
def test_intervals_of_several_runs_hold_the_truth(of_runs: float) -> None:
    """Of three runs over twelve layers, whether or not runs differ beyond their points."""
    population = dataclasses.replace(MILD, of_runs=of_runs)
    random = np.random.default_rng(1)
    singles = [population.draw(200, random) for _ in range(400)]
    known = pearson(*(np.concatenate([getattr(c, a) for c in singles]) for a in "xy"))
    held = []
    for _ in range(600):
        low, high = interval(moments.pooled(population.draw(12, random, runs=3))[0])
        held.append(low <= known <= high)
    assert 0.92 <= np.mean(held) <= 0.985


def test_differences_of_the_same_layers_hold_the_truth() -> None:
    """Two runs whose layers go together: the interval is narrower than of strangers, and right."""
    random = np.random.default_rng(5)
    held, widths, strangers = [], [], []
    for _ in range(300):
        cloud = MILD.draw(12, random, runs=2)
        both = [moments.pooled(one_run(cloud, run))[0] for run in (0, 1)]
        a, b = (sample(dataclasses.replace(r, is_correlation=False)) for r in both)
        value, ends = difference(a, b)
        held.append(ends.low <= 0 <= ends.high)
        widths.append(ends.high - ends.low)
        strangers.append(np.hypot(*(high - low for low, high in map(interval, both))))
        assert value == pytest.approx(both[0].value() - both[1].value())
    assert 0.90 <= np.mean(held) <= 0.99
    assert np.median(widths) < 0.9 * np.median(strangers)


def one_run(cloud: Cloud, run: int) -> Cloud:
    left = thinned(cloud, cloud.run == run)
    names = ("run", "unit", "at_once", "label")
    numbered = {name: np.unique(getattr(left, name), return_inverse=True)[1] for name in names}
    return dataclasses.replace(left, **numbered)


def test_difference_of_unrelated_estimates_adds_squares() -> None:
    random = np.random.default_rng(6)
    slopes = [moments.pooled(MILD.draw(200, random))[1] for _ in range(2)]
    value, (low, high) = difference(*map(sample, slopes))
    ends = [interval(slope) for slope in slopes]
    assert value == pytest.approx(slopes[0].value() - slopes[1].value())
    assert high - low == pytest.approx(np.hypot(*(e.high - e.low for e in ends)), rel=0.15)
