"""Options that several commands have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from wda.checkpoints import Given

Alpha = Annotated[
    float | None,
    typer.Option(min=0, metavar="α", help="The scaling's α, where the checkpoint has none."),
]
Enabled = Annotated[
    str | None,
    typer.Option(
        metavar="LABELS",
        help="Which parts of a fused projection its factors change, such as query,value.",
    ),
]
Axis = Annotated[
    str | None,
    typer.Option(
        metavar="output|input", help="What a magnitude has one number of, where nothing tells."
    ),
]
Initial = Annotated[
    str | None,
    typer.Option(
        metavar="LOCATION", help="The adapter as it was before training, for CorDA, LoRA-GA, …"
    ),
]

LeaveOutFloored = Annotated[
    bool,
    typer.Option(
        "--leave-out-floored",
        help="Leave rows under three times what rounding alone would give out of the fits.",
    ),
]


def gather(
    alpha: float | None,
    enabled: str | None,
    axis: str | None,
    initial: str | None,
    trained_on: str | None = None,
) -> Given:
    """Gather what the user says of checkpoints that they do not say themselves."""
    from wda.checkpoints import Given

    if axis not in (None, "output", "input"):
        raise typer.BadParameter(f"'output' or 'input', not {axis!r}", param_hint="--axis")
    parts = None if enabled is None else tuple(word.strip() for word in enabled.split(","))
    return Given(alpha, parts, axis, initial, trained_on)  # type: ignore[arg-type]
