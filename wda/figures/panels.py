"""What every figure begins with: rows that can be drawn, an Axes, and panels per run and matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wda import style
from wda.draws import Draws
from wda.errors import TableError, listing
from wda.figures.encoding import wrapped
from wda.statistics import ALL
from wda.table import check_table

X_LABEL = "ΔD"
Y_LABEL = "ΔM"

# Column → how it is called on an axis.
QUANTITIES = {
    "delta_m": Y_LABEL,
    "delta_d": X_LABEL,
    "delta_m_signed": "mean m_t − m_0",
    "delta_m_relative": "ΔM / m_0",
    "relative_update": "‖ΔW‖ / ‖W0‖",
    "update_norm": "‖ΔW‖",
    "share_grown": "share of vectors grown",
    "effective_rank": "effective rank of ΔW",
    "magnitude_change": "m_t − m_0",
    "direction_change": "1 − cos(w_t, w_0)",
}

# Letters of a title that fit above a panel of a third of a page.
_TITLE_LETTERS = 20

# Of more panels in a row than fit the page, each gets this width in inches, and the figure grows.
_NARROWEST = 1.4

# What spans more than this factor is drawn on a logarithmic scale.
_WIDE = 30.0

DrawPanel = Callable[[Axes, pd.DataFrame, str, str], None]


def checked(table: pd.DataFrame, quantities: Sequence[str], figure: str) -> pd.DataFrame:
    """Make sure that a table can be drawn; what is not finite becomes missing.

    Raises
    ------
    TableError
        When it lacks columns, mixes axes or granularities, or has no row with all quantities.
    """
    table = check_table(table)
    for column in ("per", "granularity"):
        if len(kinds := table[column].dropna().unique()) > 1:
            raise TableError(
                f"{figure}: the table mixes {column} {listing(sorted(kinds))}, which cannot be "
                f"compared; select one, such as table[table[{column!r}] == {kinds[0]!r}]"
            )
    return with_values(table, quantities, figure)


def with_values(frame: pd.DataFrame, quantities: Sequence[str], figure: str) -> pd.DataFrame:
    """Make sure that there is something to draw; what is not finite becomes missing.

    Raises
    ------
    TableError
        When a column is not there, or no row has a finite number in each.
    """
    if missing := [name for name in quantities if name not in frame.columns]:
        raise TableError(f"{figure}: columns missing: {listing(missing)}")
    frame = frame.assign(
        **{name: frame[name].replace([np.inf, -np.inf], np.nan) for name in quantities}
    )
    if not has_values(frame, quantities):
        raise TableError(
            f"{figure}: no row has a finite {' and '.join(quantities)}; there is nothing to draw"
        )
    return frame


def with_methods(frame: pd.DataFrame, methods: dict[str, str] | None) -> pd.DataFrame:
    """Add the methods of the runs to what lies beside a table, which does not tell them."""
    return frame.assign(method=[(methods or {}).get(run, "") for run in frame["run"]])


def has_values(rows: pd.DataFrame, quantities: Sequence[str]) -> bool:
    """Tell whether any row has all of the quantities."""
    return bool(rows[list(quantities)].notna().all(axis=1).any())


def numbered(table: pd.DataFrame, draws: Draws | None) -> pd.DataFrame:
    """Give every row its number, so that a selection of them finds its draws.

    Raises
    ------
    TableError
        When the draws are those of another table.
    """
    if draws is not None and len(draws.delta_m) != len(table):
        raise TableError(
            f"draws: {len(draws.delta_m)} rows, and the table has {len(table)}; select the same "
            "rows of both, with draws.of(mask)"
        )
    return table.assign(row_number=np.arange(len(table)))


def is_wide(values: np.ndarray) -> bool:
    """Tell whether values are positive and span so much that only their logarithm shows them."""
    known = values[np.isfinite(values)]
    return bool(known.size and known.min() > 0 and known.max() > _WIDE * known.min())


def in_layers(table: pd.DataFrame, quantity: str, figure: str) -> pd.DataFrame:
    """Leave out rows outside the layers.

    Raises
    ------
    TableError
        When none is left with a number.
    """
    rows = table[table["layer"].notna()]
    if not has_values(rows, [quantity]):
        raise TableError(
            f"{figure}: no row with a finite {quantity} lies in a numbered layer; "
            "draw the scatter instead"
        )
    return rows


def only(table: pd.DataFrame, column: str, figure: str) -> str:
    """Give the one run, or matrix label, of a table.

    Raises
    ------
    TableError
        When there are several.
    """
    values = list(dict.fromkeys(table[column]))
    if len(values) > 1:
        raise TableError(
            f"{figure}: one Axes shows one {column}, and the table has {listing(values, 4)}; "
            f"select one, such as table[table[{column!r}] == {values[0]!r}], or draw the grid"
        )
    return str(values[0])


def label_of(table: pd.DataFrame) -> str:
    """Give the one matrix label of a table, or the word for all of several."""
    labels = table["matrix"].unique()
    return str(labels[0]) if len(labels) == 1 else ALL


def new_axes(ax: Axes | None, height: float = 0.8) -> Axes:
    """Give the Axes to draw on: the one that came, or one of a column's width."""
    if ax is not None:
        return ax
    size = (style.COLUMN_WIDTH, height * style.COLUMN_WIDTH)
    _, ax = plt.subplots(figsize=size, layout="constrained")
    return ax


def last_steps(table: pd.DataFrame, step: int | None = None) -> pd.DataFrame:
    """Select one step, by default the last of each run.

    Raises
    ------
    TableError
        When no run has that step.
    """
    if step is not None:
        rows = table[(table["step"] == step).fillna(False)]
        if rows.empty:
            steps = listing(sorted(table["step"].dropna().unique()))
            raise TableError(f"step: no checkpoint {step} in the table; there are {steps}")
        return rows
    known = table["step"].fillna(-1)
    return table[known == known.groupby(table["run"]).transform("max")]


def step_words(table: pd.DataFrame) -> str:
    """Say which step a selection of one per run shows."""
    steps = table["step"].dropna().unique()
    return f"step {steps[0]}" if len(steps) == 1 else "last checkpoint"


def grid_of_runs(
    table: pd.DataFrame,
    quantities: Sequence[str],
    draw: DrawPanel,
    labels: tuple[str, str],
    *,
    width: float,
    key: float = 0.0,
    bar: float = 0.0,
) -> tuple[Figure, np.ndarray]:
    """Make a panel per run and matrix label, runs beside each other, matrices below each other.

    Parameters
    ----------
    table : pandas.DataFrame
        Rows with the columns run, method and matrix.
    quantities : sequence of str
        What a panel needs to be drawn; one without any says so.
    draw : callable
        Draws one panel: ``draw(ax, rows, run, matrix)``.
    labels : tuple of str
        Of the x and the y axis.
    width : float
        Of the whole figure, in inches; three panels fill it.
    key : float
        Inches beside the panels that are left for the key.
    bar : float
        Inches beside each panel that its own colour bar takes.

    Returns
    -------
    tuple of Figure and numpy.ndarray
        The Axes in shape (matrices, runs).
    """
    runs = list(dict.fromkeys(zip(table["run"], table["method"], strict=True)))
    matrices = list(dict.fromkeys(table["matrix"]))
    panel = max((width - key) / max(3, len(runs)), _NARROWEST + bar)
    figure, axes = plt.subplots(
        len(matrices),
        len(runs),
        figsize=(panel * len(runs) + key, 2.05 * len(matrices) + 0.3),
        squeeze=False,
        layout="constrained",
    )
    letters = int(_TITLE_LETTERS * (panel - 2 * bar) / 1.9)  # clear of the bar, though centred
    for row, matrix in enumerate(matrices):
        for column, (run, method) in enumerate(runs):
            ax = axes[row, column]
            rows = table[(table["run"] == run) & (table["matrix"] == matrix)]
            if rows.empty:
                say(ax, "no such matrix\nin this run")
            elif not has_values(rows, quantities):
                say(ax, "no finite values")
            else:
                draw(ax, rows, str(run), str(matrix))
            if row == 0:
                ax.set_title(wrapped(style.run_title(run, method), letters))
            y_label = f"{wrapped(matrix, 28)}: {labels[1]}" if len(matrices) > 1 else labels[1]
            ax.set_ylabel(y_label if column == 0 else "")
            ax.set_xlabel(labels[0] if row == len(matrices) - 1 else "")
    return figure, axes


def say(ax: Axes, words: str) -> None:
    """Say on a panel why nothing is drawn there."""
    ax.text(0.5, 0.5, words, ha="center", va="center", transform=ax.transAxes)
    ax.set(xticks=[], yticks=[])


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure as PNG and PDF, in its own size, and close it."""
    with style.paper_style():
        for ending in ("png", "pdf"):
            # No date in the file, so that the same table gives the same bytes.
            metadata = {"CreationDate": None} if ending == "pdf" else {"Software": "wda"}
            figure.savefig(folder / f"{name}.{ending}", metadata=metadata)
    plt.close(figure)
