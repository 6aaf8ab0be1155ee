"""Static figures as data URIs, which stand in a page instead of beside it."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def png(figure: Figure, dots_per_inch: int) -> str:
    """Draw a figure as PNG."""
    return _drawn(figure, "png", "image/png", dpi=dots_per_inch)


def svg(figure: Figure) -> str:
    """Draw a figure as SVG, its letters as outlines; the same figure gives the same bytes."""
    return _drawn(figure, "svg", "image/svg+xml", metadata={"Date": None})


def within(figure: Figure, most: int) -> str:
    """Draw a figure as SVG or, where that takes more than ``most`` letters, as a PNG that does not.

    A figure of many thousand points is smaller in pixels. What does not fit at all comes as small
    as it can still be read.
    """
    picture = svg(figure)
    for dots_per_inch in (220, 110):
        if len(picture) > most:
            picture = png(figure, dots_per_inch)
    return picture


def _drawn(figure: Figure, ending: str, kind: str, **options: Any) -> str:
    import matplotlib as mpl  # noqa: PLC0415 - slow to import

    from wda import style  # noqa: PLC0415

    drawn = BytesIO()
    with style.paper_style(), mpl.rc_context({"svg.hashsalt": "wda"}):
        figure.savefig(drawn, format=ending, **options)
    return f"data:{kind};base64,{base64.b64encode(drawn.getvalue()).decode()}"
