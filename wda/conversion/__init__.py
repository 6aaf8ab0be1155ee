"""Adapters written in another layout, exactly, or next to it where that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress

from wda.checkpoints import Adapter, Given
from wda.checkpoints.found import ENDINGS
from wda.checkpoints.given import NOTHING_GIVEN
from wda.conversion.change import Change, Weight
from wda.conversion.lycoris import LYCORIS
from wda.conversion.mlx import MLX
from wda.conversion.nvlabs import NVLABS
from wda.conversion.peft import PEFT
from wda.conversion.source import Source
from wda.conversion.target import Target, common_scaling, fitted
from wda.conversion.torchtune import TORCHTUNE
from wda.errors import ConversionError, OutputError, listing
from wda.files import staged_folder
from wda.manifest import make_manifest
from wda.naming import natural_order
from wda.progress import progress_bar
from wda.runs import open_runs

__all__ = ["TARGETS", "Conversion", "convert"]

TARGETS = {
    "peft": PEFT,
    "lycoris": LYCORIS,
    "mlx": MLX,
    "nvlabs": NVLABS,
    "torchtune": TORCHTUNE,
}


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes
    ----------
    files : tuple of Path
        The files.
    errors : dict
        Module → ‖Δ' − Δ‖/‖Δ‖ of what was approximated, Δ = Wt − W0; what is not named is exact.
    notes : tuple of str
        What of the adapter was left out.
    """

    files: tuple[Path, ...]
    errors: dict[str, float]
    notes: tuple[str, ...]


def convert(
    adapter: str | Path,
    to: str,
    out: str | Path,
    base: str | Path | None = None,
    approximate: int | None = None,
    given: Given = NOTHING_GIVEN,
    progress: bool = True,
) -> Conversion:
    """Write an adapter in another layout.

    Parameters
    ----------
    adapter : path or location
        One checkpoint, of any layout of adapters that is read.
    to : {"peft", "lycoris", "mlx", "nvlabs", "torchtune"}
        The layout.
    out : path
        Folder to write into; it must hold no other weights.
    base : path or location, optional
        The pre-trained model, by default what the adapter names. It is opened only where
        something has to be computed from it.
    approximate : int, optional
        Rank of the factors that stand in for what the layout cannot express. By default that is
        refused.
    given : Given, optional
        What the adapter does not say itself.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    Conversion
        The files, and how far off what was approximated is.

    Raises
    ------
    ConversionError
        When the layout cannot express the adapter.
    WdaError
        When the adapter or the base cannot be read, or ``out`` cannot be written to.
    """
    if to not in TARGETS:
        raise ConversionError(f"to: {to!r} is no layout that is written; {listing(TARGETS)} are")
    target, folder = TARGETS[to], Path(out)
    source = Source(_open_adapter(str(adapter), given), base)
    _check_folder(folder, source, target)
    with staged_folder(folder) as scratch, progress_bar(progress) as bar:
        changes, weights, rough = _carried(source, target, approximate, bar)
        if not changes:
            raise ConversionError(f"{adapter}: has no factors and no magnitudes to convert")
        final = fitted(target, changes, source)
        errors = {source.name(m): _error(source, m, final[m]) for m in rough}
        target.write(scratch, list(final.values()), weights, source)
    return Conversion(tuple(folder / name for name in target.files), errors, _notes(source))


def _open_adapter(location: str, given: Given) -> Adapter:
    members = open_runs(make_manifest(location, given=given).runs)
    checkpoint = members[-1].checkpoint
    if len(members) > 1:
        raise ConversionError(
            f"{location}: holds {len(members)} checkpoints; give one of them, such as "
            f"{checkpoint.path}"
        )
    if not isinstance(checkpoint, Adapter):
        raise ConversionError(f"{location}: is a {checkpoint.layout}; only adapters are converted")
    return checkpoint


def _check_folder(folder: Path, source: Source, target: Target) -> None:
    """Refuse a folder where what is written would lie beside, or over, other weights."""
    own = Path(str(source.adapter.path)).resolve()
    if folder.resolve() in (own, own.parent if own.is_file() else own):
        raise OutputError(f"{folder}: is the adapter's own folder; choose another")
    held = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    others = [name for name in held if name.endswith(ENDINGS) and name not in target.files]
    if others:
        raise OutputError(f"{folder}: holds other weights ({listing(others, 3)}); choose another")


def _carried(
    source: Source, target: Target, approximate: int | None, bar: Progress
) -> tuple[dict[str, Change], list[Weight], list[str]]:
    """Give changes by the adapter's own names, weights, and which changes are approximated."""
    modules = sorted(source.modules, key=natural_order)
    found = {module: source.carried(module) for module in modules}
    reasons = {}
    for module, one in found.items():
        reason = one if isinstance(one, str) else target.reason(source, one)
        if reason is not None:
            reasons[module] = reason
    kept = {m: one for m, one in found.items() if m not in reasons}
    changes = {m: one for m, one in kept.items() if isinstance(one, Change)}
    weights = [one for one in kept.values() if isinstance(one, Weight)]
    folded = _unequal(changes) if target.one_scaling else {}
    if approximate is None:
        _refuse(reasons | folded)
    task = bar.add_task("approximating", total=len(reasons), note="", visible=bool(reasons))
    scaling = common_scaling(list(changes.values()))
    for module in reasons:
        _refuse_still(source, target, module)
        assert approximate is not None
        changes[module] = source.approximated(module, approximate, scaling)
        bar.advance(task)
    in_order = {module: changes[module] for module in modules if module in changes}
    return in_order, weights, [*reasons, *folded]


def _unequal(changes: dict[str, Change]) -> dict[str, str]:
    """Say of which modules the factor s is not that of the others."""
    scaling = common_scaling(list(changes.values()))
    return {
        module: f"its scaling {change.scaling:g} is not the {scaling:g} of the others"
        for module, change in changes.items()
        if change.rank and change.scaling != scaling
    }


def _refuse(reasons: dict[str, str]) -> None:
    if reasons:
        said = [f"{module}: {reason}" for module, reason in reasons.items()]
        raise ConversionError(
            f"cannot be expressed exactly: {listing(said, 3)}; --approximate RANK writes factors "
            "that come next to it"
        )


def _refuse_still(source: Source, target: Target, module: str) -> None:
    """Refuse what no factors can stand in for either."""
    source.matrix(module, why := "approximating it")
    reason = target.missing(source, source.name(module))
    if source.kernel(module, why) and not target.kernels:
        reason = "it is a convolution, which the layout has none of"
    if source.is_embedding(module):
        reason = "it is an embedding"
    if reason is not None:
        raise ConversionError(f"{module}: {reason}, and nothing can stand in for it")


def _error(source: Source, module: str, change: Change) -> float:
    """Give ‖Δ' − Δ‖/‖Δ‖ of a module, with the numbers that are written."""
    w0 = source.w0(module, "the error of an approximation")
    delta = source.delta(module, w0)
    written = change.update.delta(w0, slice(None))
    size = torch.linalg.norm(delta)
    off = torch.linalg.norm(written - delta)
    return float(off / size) if size > 0 else float(off)


def _notes(source: Source) -> tuple[str, ...]:
    left = source.adapter.unread
    return (f"not converted, for it was not read: {listing(left, 4)}",) if left else ()
