"""Measures ΔM and ΔD of a model while it trains, without writing checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from wda.callbacks.live import Weight, find_weights
from wda.changes import changes
from wda.checkpoints import FullCheckpoint, open_base
from wda.decomposition import Per, check_per
from wda.engine import moved
from wda.errors import ModelError, listing
from wda.files import staged_folder
from wda.locations import locate
from wda.naming import DEFAULT_LABELS, Matrix, align, find_matrices, select
from wda.table import make_table, write_table
from wda.updates import Update


class DecompositionCallback(TrainerCallback):  # type: ignore[misc]
    """Measures ΔM and ΔD against W0 at chosen steps of a training.

    It knows full fine-tuning, LoRA and DoRA of peft, and those of :mod:`wda.adapters`. W0 is the
    frozen weight beside an adapter. Of full fine-tuning it is a copy of the chosen matrices in the
    processor's memory, taken when the training begins, unless ``base`` says where it lies. Only
    the main process measures, and nothing of the training changes: no weight, no random number.

    Parameters
    ----------
    steps : iterable of int, optional
        The steps after which to measure.
    every : int, optional
        Measure after every so many steps instead, and at the end.
    matrices : str or sequence of str
        Labels such as ``"query"``, modules' last names such as ``"q_proj"``, or ``"re:PATTERN"``,
        in a sequence or with commas between.
    per : {"output", "input"}
        One vector per output feature, as in the paper, or per input feature.
    base : path or location, optional
        Where W0 lies, when the model does not begin with it: a full fine-tuning that is resumed.
    log : callable, optional
        ``trainer.log``, so that means over the layers reach what the Trainer reports to, under
        names such as ``wda/delta_m/query``.
    out : path, optional
        Folder for ``table.parquet`` and ``table.csv``, written when the training ends.
    run : str, optional
        Name of the run in the table; by default that of the Trainer's output folder.

    Raises
    ------
    ValueError
        When not exactly one of ``steps`` and ``every`` is given, or one is out of range, or
        ``per`` is neither word.
    WdaError
        When the training begins: matrices that do not exist, a model that is not understood, a
        folder that cannot be written to.
    """

    def __init__(
        self,
        steps: Iterable[int] | None = None,
        *,
        every: int | None = None,
        matrices: str | Sequence[str] = DEFAULT_LABELS,
        per: Per = "output",
        base: str | Path | None = None,
        log: Callable[[dict[str, float]], object] | None = None,
        out: str | Path | None = None,
        run: str | None = None,
    ) -> None:
        check_per(per)
        self._steps = None if steps is None else frozenset(steps)
        if (self._steps is None) == (every is None) or min(self._steps or {every or 0}) < 1:
            raise ValueError(
                "DecompositionCallback() takes the steps to measure after, such as "
                "steps=[100, 200], or every=100; steps count from 1; "
                f"got steps={steps!r}, every={every!r}"
            )
        self._every, self._per, self._log, self._run = every or 0, per, log, run
        words = matrices.split(",") if isinstance(matrices, str) else matrices
        self._wanted = [word.strip() for word in words]
        self._base_location, self._out = base, None if out is None else Path(out)
        self._rows: list[dict[str, object]] = []
        self._start: _Start | None = None

    @property
    def table(self) -> pd.DataFrame:
        """What was measured so far; columns in :data:`wda.table.COLUMNS`."""
        return make_table(self._rows)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Choose the matrices, and keep W0."""
        if not state.is_world_process_zero:
            return
        model, base = kwargs["model"], self._base_location
        resumed = state.global_step if base is None else 0
        opened = None if base is None else open_base(locate(base))
        self._start = _Start(model, self._wanted, opened, resumed)
        self._rows = []
        if self._out is not None:
            with staged_folder(self._out):
                pass  # that it cannot be written to is better known before the training

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, where the step is one of those to be measured."""
        if self._start is None or not self._is_chosen(state.global_step, control):
            return
        place = {
            "run": self._run or Path(args.output_dir).name,
            "seed": args.seed,
            "step": state.global_step,
            "per": self._per,
        }
        rows = [place | row for row in self._start.measure(kwargs["model"], self._per)]
        self._rows.extend(rows)
        if self._log is not None:
            logs_too = control.should_log  # which the Trainer forgets when something was logged
            self._log(_means(rows))
            control.should_log = logs_too

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Write the table, and let go of W0."""
        if self._start is None:
            return
        self._start = None
        if not self._rows:
            warnings.warn(
                f"DecompositionCallback: nothing was measured in {state.global_step} steps",
                stacklevel=2,
            )
        elif self._out is not None:
            with staged_folder(self._out) as folder:
                write_table(self.table, folder)

    def _is_chosen(self, step: int, control: Any) -> bool:
        if self._steps is not None:
            return step in self._steps
        return step % self._every == 0 or control.should_training_stop


class _Start:
    """Where a training started: the chosen matrices, and W0 of each.

    Parameters
    ----------
    model : nn.Module
        The model as its training begins.
    wanted : sequence of str
        Which matrices.
    base : FullCheckpoint or None
        Where W0 is read from; None where the model itself holds it.
    resumed : int
        The step after which the training goes on, where the model has to hold W0.
    """

    def __init__(
        self, model: nn.Module, wanted: Sequence[str], base: FullCheckpoint | None, resumed: int
    ) -> None:
        weights = find_weights(model)
        names = weights if base is None else _by_names_in(base, weights)
        self._matrices = select(_matrices(model, names, base), wanted)
        self._names = {name: own for own, name in zip(weights, names, strict=True)}
        self._base, self._kept = base, dict[Matrix, Tensor]()
        trained_whole = [m for m in self._matrices if names[m.module].direction is None]
        if trained_whole and resumed:
            raise ModelError(
                f"base: the training goes on after step {resumed}, so that the model no longer "
                "holds the weights it started from; give base= the location of those"
            )
        if base is None:
            self._kept = {m: names[m.module].taken(m).clone() for m in trained_whole}

    def measure(self, model: nn.Module, per: Per) -> list[dict[str, object]]:
        """Measure every matrix as it is now; one row for each."""
        weights = find_weights(model)
        rows = []
        for matrix in self._matrices:
            weight = weights[self._names[matrix.module]]
            with torch.no_grad():
                numbers = _numbers(self._w0(matrix, weight), weight.update(matrix), per)
            rows.append(
                {
                    "method": weight.method,
                    "rank": weight.rank,
                    "module": matrix.module,
                    "layer": matrix.layer,
                    "matrix": matrix.label,
                    "out_features": matrix.shape[0],
                    "in_features": matrix.shape[1],
                    **numbers,
                }
            )
        return rows

    def _w0(self, matrix: Matrix, weight: Weight) -> Tensor:
        if self._base is not None:
            return self._base.weight(matrix.module, matrix)
        return self._kept[matrix] if matrix in self._kept else weight.taken(matrix)


def _by_names_in(base: FullCheckpoint, weights: dict[str, Weight]) -> dict[str, Weight]:
    """Give the weights by the base's names of their modules."""
    rename = align(weights, base.modules)
    return {rename(name): weight for name, weight in weights.items()}


def _matrices(
    model: nn.Module, weights: dict[str, Weight], base: FullCheckpoint | None
) -> list[Matrix]:
    """List the matrices of a model, or those of them that the base has."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    shapes = {f"{name}.weight": tuple(weight.stored.shape) for name, weight in weights.items()}
    if base is not None:
        of_base = base.tensors.shapes_of(name for name in shapes if name in base.tensors)
        other = [name for name, shape in of_base.items() if shape != shapes[name]]
        if other:
            raise ModelError(
                f"base: {base.path} has other shapes than the model, of {listing(other, 4)}; is "
                "it what the training started from?"
            )
        shapes, settings = of_base, base.config
    return find_matrices(shapes, lambda module, _shape: weights[module].transposed, settings)


def _numbers(w0: Tensor, update: Update, per: Per) -> dict[str, object]:
    """Measure one update, in the columns of a table's row."""
    (change,) = changes(moved(w0, [update], per)[0], "vector", None)
    return change.columns


def _means(rows: Sequence[dict[str, object]]) -> dict[str, float]:
    """Give what is logged: the mean of ΔM and ΔD over the matrices of each label."""
    means = pd.DataFrame(rows).groupby("matrix", sort=False)[["delta_m", "delta_d"]].mean()
    return {
        f"wda/{column}/{label}": float(means.loc[label, column])
        for label in means.index
        for column in means.columns
    }
