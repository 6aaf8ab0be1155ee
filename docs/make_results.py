"""Writes the tables and figures of docs/results.md from the sweeps in docs/results.

Run it from the top of the repository: python docs/make_results.py
After training again, copy first: python docs/make_results.py FOLDER_OF_THE_SWEEPS
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from small_pictures import save_small

from wda import figures, style
from wda.figures.encoding import dot
from wda.statistics import mean_of_repetitions
from wda.sweeps.figures import best_settings

DOCS = Path(__file__).parent
SWEEPS = DOCS / "results"
PAGE = DOCS / "results.md"
# What of a sweep the page needs, beside its table.
KEPT = {
    "learning_rate": ("sweep.csv", "statistics.csv", "table.parquet"),
    "length": ("sweep.csv", "statistics.csv"),
}
ALL_ROWS = 7677  # of Rotten Tomatoes, without those held out
METHODS = ["ft", "weightnorm", "lora", "dora"]

SETTINGS = {
    "LoRA, all six": ("lora", "query+key+value+output+up+down", None),
    "DoRA, all six": ("dora", "query+key+value+output+up+down", None),
    "DoRA, V of q k v, m of all six": ("dora", "query+key+value", "query+key+value+output+up+down"),
    "DoRA, q k v": ("dora", "query+key+value", None),
    "m alone, all six": ("magnitude", "query+key+value+output+up+down", None),
}


def sweep(name: str) -> pd.DataFrame:
    """Read a sweep's table."""
    return pd.read_csv(SWEEPS / name / "sweep.csv")


def told(values: pd.Series, digits: str = ".3f") -> str:
    """Write a mean over the seeds with half its 95 % interval."""
    mean, (_, high) = mean_of_repetitions(values)
    return f"{mean:{digits}}" + (
        "" if high - mean < 1e-12 else f" ± {high - mean:{digits.lstrip('+')}}"
    )


def by_setting(rows: pd.DataFrame, fields: Sequence[str], columns: dict[str, str]) -> str:
    """Give a table with a line for each setting: means over the seeds with their intervals."""
    lines = []
    for names, of_setting in rows.groupby(list(fields), sort=False, dropna=False):
        numbers = [told(of_setting[column], digits) for column, digits in columns.items()]
        lines.append([*map(_word, names), *numbers])
    return as_table([*fields, *columns], lines)


def as_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _word(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else style.method_name(str(value))


def correlations() -> tuple[str, Figure]:
    """Figure 2: r of every method and rate, beside that of random updates."""
    fits = _fits("learning_rate")
    lines = []
    for method in METHODS:
        of_method = fits[fits["method"] == method]
        for (rate, matrix), rows in of_method.groupby(["learning_rate", "matrix"]):
            lines.append([style.method_name(method), f"{rate:g}", str(matrix), *_of_fits(rows)])
    return as_table(["method", "rate", "matrix", *OF_FITS], lines), _correlation_figure(fits)


def lengths() -> str:
    """Figure 2 again: the same rates, trained for 160 and for 480 steps."""
    short, long = _fits("learning_rate"), _fits("length")
    alike = long[["method", "learning_rate"]].drop_duplicates()
    lines = []
    for fits in (short.merge(alike), long):
        for (method, matrix), rows in fits.groupby(["method", "matrix"], sort=False):
            steps = f"{rows['steps'].iloc[0]:.0f}"
            lines.append([style.method_name(method), steps, str(matrix), *_of_fits(rows)])
    return as_table(["method", "steps", "matrix", *OF_FITS], sorted(lines))


OF_FITS = ["accuracy", "r", "within layers", "between layers", "random updates' r"]


def _fits(name: str) -> pd.DataFrame:
    """Read the fits of query and value of every run of a sweep."""
    settings = sweep(name).reindex(columns=["run", "learning_rate", "accuracy", "steps", "method"])
    rates = {"lora": 1e-3, "dora": 1e-3, "ft": 1e-4} if name == "length" else {}
    settings["learning_rate"] = settings["learning_rate"].fillna(settings["method"].map(rates))
    fits = pd.read_csv(SWEEPS / name / "statistics.csv").dropna(subset=["run"])
    return fits[fits["matrix"].isin(["query", "value"])].merge(settings, on=["run", "method"])


def _of_fits(rows: pd.DataFrame) -> list[str]:
    """Write the means over the seeds."""
    means = rows.mean(numeric_only=True)
    numbers = [f"{means[name]:+.2f}" for name in ("pearson_r", "within_layer_r", "between_layer_r")]
    band = f"{means['null_r_low']:+.2f} to {means['null_r_high']:+.2f}"
    return [f"{means['accuracy']:.3f}", *numbers, band]


def _correlation_figure(fits: pd.DataFrame) -> Figure:
    with style.paper_style():
        figure, axes = plt.subplots(
            1, 4, figsize=(style.PAGE_WIDTH, 2.1), sharey=True, layout="constrained"
        )
        for ax, method in zip(axes, METHODS, strict=True):
            _draw_correlations(ax, fits[fits["method"] == method])
            ax.set(title=style.method_name(method), xlabel="learning rate")
        axes[0].set_ylabel("r of ΔM and ΔD")
        keys = [dot("#0072B2", "query"), dot("#E69F00", "value", "s")]
        axes[-1].legend(handles=[*keys, dot("0.72", "random", "s")], loc="lower left")
    return figure


def _draw_correlations(ax: Axes, fits: pd.DataFrame) -> None:
    rates = sorted(fits["learning_rate"].unique())
    for (matrix, rate), rows in fits.groupby(["matrix", "learning_rate"]):
        x = rates.index(rate) + (-0.13 if matrix == "query" else 0.13)
        band = [rows["null_r_low"].mean(), rows["null_r_high"].mean()]
        ax.plot([x, x], band, color="0.72", lw=6, solid_capstyle="butt")
        colour, marker = ("#0072B2", "o") if matrix == "query" else ("#E69F00", "s")
        ax.scatter([x] * len(rows), rows["pearson_r"], 14, colour, marker=marker, zorder=3, lw=0)
    ax.axhline(0, color="0.5", lw=0.6)
    ax.set_xticks(range(len(rates)), [f"{rate:.0e}".replace("e-0", "e-") for rate in rates])
    ax.set(xlim=(-0.5, len(rates) - 0.5), ylim=(-1.05, 1.1))


def distances() -> tuple[str, Figure]:
    """Figure 3: how far each method moves at its best rate."""
    table = sweep("learning_rate")
    best = best_settings(table, ["learning_rate"])
    moved = pd.read_parquet(SWEEPS / "learning_rate/table.parquet")
    figure = figures.profile_grid(moved[moved["run"].isin(best["run"])])
    columns = {"accuracy": ".3f", "delta_m": ".2g", "delta_d": ".2g"}
    return by_setting(best, ["method", "learning_rate"], columns), figure


def ranks() -> tuple[str, Figure]:
    """Figure 5: accuracy against rank."""
    table = sweep("rank")
    columns = {"accuracy": ".3f", "trainable_share": ".3%", "delta_d": ".2g"}
    return by_setting(table, ["method", "rank"], columns), _of(figures.repetitions(table, "rank"))


def granularity() -> tuple[str, Figure]:
    """Table 6: what is trained of which matrices."""
    table = sweep("granularity")
    table["setting"] = [_setting(row) for row in table.to_dict("records")]
    columns = {"accuracy": ".3f", "trainable_share": ".3%"}
    axes = figures.repetitions(table, "setting", series=["setting"])
    return by_setting(table, ["setting"], columns), _of(axes)


def _setting(row: dict[str, object]) -> str:
    magnitudes = row["magnitudes"] if isinstance(row["magnitudes"], str) else None
    wanted = (row["method"], row["targets"], magnitudes)
    return next(name for name, setting in SETTINGS.items() if setting == wanted)


def samples() -> tuple[str, Figure]:
    """Figure 4: accuracy against the sentences trained on."""
    table = sweep("samples")
    table["samples"] = table["samples"].fillna(ALL_ROWS)
    axes = figures.repetitions(table, "samples")
    columns = {"accuracy": ".3f", "loss": ".3f"}
    return by_setting(table, ["method", "samples"], columns), _of(axes)


def gradients() -> tuple[str, Figure]:
    """Table 7: the norm held constant, and not."""
    table = sweep("gradient")
    table["gradient"] = table["full_gradient"].map({False: "Eq. 11", True: "Eq. 6"})
    columns = {"accuracy": ".3f", "loss": ".3f", "delta_m": ".3g", "delta_d": ".3g"}
    axes = figures.repetitions(table, "gradient", "loss", series=["gradient"])
    return by_setting(table, ["gradient"], columns), _of(axes)


def vera() -> tuple[str, Figure]:
    """Table 5: VeRA and DVoRA beside LoRA and DoRA."""
    table = sweep("vera")
    columns = {"accuracy": ".3f", "trainable_share": ".3%", "delta_m": ".2g", "delta_d": ".2g"}
    best = best_settings(table, ["learning_rate"])
    axes = figures.repetitions(best, "method")
    return by_setting(table, ["method", "learning_rate"], columns), _of(axes)


def rates() -> tuple[str, Figure]:
    """ArXiv 2602.04998: LoRA and DoRA at several learning rates."""
    table = sweep("learning_rate")
    table = table[table["method"].isin(["lora", "dora"])]
    pairs = table.pivot_table(index=["learning_rate", "seed"], columns="method", values="accuracy")
    pairs = (pairs["dora"] - pairs["lora"]).reset_index(name="DoRA − LoRA, same seed")
    columns = {"DoRA − LoRA, same seed": "+.4f"}
    axes = figures.repetitions(table, "learning_rate")
    return by_setting(pairs, ["learning_rate"], columns), _of(axes)


QUESTIONS: dict[str, Callable[[], tuple[str, Figure]]] = {
    "correlations": correlations,
    "distances": distances,
    "ranks": ranks,
    "granularity": granularity,
    "samples": samples,
    "gradients": gradients,
    "vera": vera,
    "rates": rates,
}


def _of(ax: Axes) -> Figure:
    assert isinstance(ax.figure, Figure)
    return ax.figure


def fill(page: str, tables: dict[str, str]) -> str:
    """Put tables between the page's marks ``<!-- NAME -->`` and ``<!-- end -->``."""
    for name, table in tables.items():
        before, _, rest = page.partition(f"<!-- {name} -->\n")
        page = f"{before}<!-- {name} -->\n{table}\n{rest[rest.index('<!-- end -->') :]}"
    return page


def keep(folder: Path) -> None:
    """Copy of every sweep what the page is made from."""
    for found in sorted(folder.glob("*/sweep.csv")):
        into = SWEEPS / found.parent.name
        into.mkdir(parents=True, exist_ok=True)
        for name in KEPT.get(into.name, ("sweep.csv",)):
            shutil.copy(found.parent / name, into / name)


def tables(pictures: Path) -> dict[str, str]:
    """Make every question's table, and draw its figure."""
    found = {"lengths": lengths()}
    for name, question in QUESTIONS.items():
        found[name], figure = question()
        save_small(figure, pictures / f"results_{name}.png")
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    filled = fill(PAGE.read_text(encoding="utf-8"), tables(DOCS / "figures"))
    PAGE.write_text(filled, encoding="utf-8")
