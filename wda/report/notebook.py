"""A comparison as Jupyter shows it: the fits as a table, and the scatter figure below."""

from __future__ import annotations

import html
from collections.abc import Sequence

import pandas as pd

from wda.report.pictures import png
from wda.report.words import headline


def notebook_html(table: pd.DataFrame, statistics: pd.DataFrame, notes: Sequence[str]) -> str:
    """Give a comparison as HTML for a notebook; it needs no more than the base install.

    Parameters
    ----------
    table, statistics : pandas.DataFrame
        Of a comparison.
    notes : sequence of str
        What was left out and why.

    Returns
    -------
    str
        A piece of HTML that names nothing outside itself; every name in it is escaped.
    """
    import matplotlib.pyplot as plt  # noqa: PLC0415 - slow to import

    from wda import figures  # noqa: PLC0415

    figure = figures.scatter_grid(table, statistics)
    picture = png(figure, dots_per_inch=110)
    plt.close(figure)
    said = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return (
        headline(statistics).to_html(index=False, border=0)
        + f'<img alt="ΔM against ΔD, a panel per run and matrix" src="{picture}">'
        + (f"<ul>{said}</ul>" if said else "")
    )
