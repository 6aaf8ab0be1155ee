"""The adapter that is converted, and the base that it is asked about."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from torch import Tensor

from wda.checkpoints import Adapter, Checkpoint, FullCheckpoint, open_named_base
from wda.checkpoints.forms import Decomposed, Factors, Form, Nothing, Stored, Wanted, Whole
from wda.checkpoints.found import Found
from wda.checkpoints.fused_forms import BlockDiagonal, Share
from wda.checkpoints.peft import PeftCheckpoint
from wda.conversion.change import Change, Weight, truncated
from wda.errors import ConversionError
from wda.naming import Matrix, find_matrices, pick
from wda.rows import Lazy

_PATHS = "knowing the paths of its modules"
_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe)$")


class Source:
    """The adapter that is converted, and its base, which is opened when it is first needed.

    Parameters
    ----------
    adapter : Adapter
        The adapter.
    base : str, Path or None
        Location of its base; by default what it names.
    """

    def __init__(self, adapter: Adapter, base: str | Path | None) -> None:
        self.adapter, self.given_base = adapter, base
        self._why = ""

    @Lazy
    def config(self) -> Mapping[str, Any]:
        """Its ``adapter_config.json``; empty where there is none."""
        return Found(self.adapter.path).config

    def base(self, why: str) -> FullCheckpoint:
        """Give the base.

        Parameters
        ----------
        why : str
            What it is needed for, for the message.

        Raises
        ------
        ConversionError
            When it is not known.
        """
        self._why = why
        return self._base

    @Lazy
    def _base(self) -> FullCheckpoint:
        if self.given_base is None and self.adapter.base is None:
            raise ConversionError(
                f"{self.adapter.path}: {self._why} needs the base, which the adapter does not "
                "name; give it with --base LOCATION"
            )
        return open_named_base([self.adapter], self.given_base)[1]

    @property
    def _opened(self) -> FullCheckpoint | None:
        known = self.given_base is not None or "_base" in self.__dict__
        return self._base if known else None

    @property
    def known_modules(self) -> frozenset[str]:
        """The modules of the adapter, and of the base where that is known."""
        more = self._opened.modules if self._opened else frozenset()
        return self.adapter.modules | more

    @property
    def turned(self) -> bool:
        """Whether the base stores what the adapter changes as (in, out), as far as is known."""
        if self._opened is None:
            return bool(self.config.get("fan_in_fan_out"))
        found = (self._matrices.get(name) for name in self.in_base.values())
        return any(matrix.stored_transposed for matrix in found if matrix)

    @Lazy
    def in_base(self) -> Mapping[str, str]:
        """The base's name of every module, by the adapter's own."""
        return self.adapter.names_in(self._base)

    def name(self, module: str) -> str:
        """Give the path that a module is written under.

        It is the adapter's own, also where the base has a prefix more or less, for the adapter
        was trained on a model with that name. Where the layout spells paths otherwise, it is the
        base's.
        """
        if self.given_base is None and self._has_paths:
            return module
        base, of_base = self.base(_PATHS), self.in_base[module]
        if of_base not in base.modules and not isinstance(self.adapter.forms[module], Whole):
            raise ConversionError(
                f"{module}: {base.path} has no {of_base}; give a base that has the same modules, "
                "neither fused into one nor apart where the adapter's are not"
            )
        return module if module.endswith(of_base) or of_base.endswith(module) else of_base

    @property
    def modules(self) -> Set[str]:
        """The modules that are written, by the adapter's own names.

        Of a fused projection they are its parts where the base has them apart.
        """
        if self._has_paths:
            return self.adapter.modules
        self.base(_PATHS)
        return self.in_base.keys()

    @property
    def _has_paths(self) -> bool:
        """Whether the adapter spells paths as models in memory do."""
        paths = isinstance(self.adapter, PeftCheckpoint)
        return paths or type(self.adapter).names_in is Checkpoint.names_in

    @Lazy
    def _matrices(self) -> Mapping[str, Matrix]:
        own = {of_base: module for module, of_base in self.in_base.items()}

        def says_transposed(module: str, stored: tuple[int, int]) -> bool:
            return module in own and self.adapter.says_transposed(own[module], stored)

        found = find_matrices(self._base.tensors.shapes, says_transposed, self._base.config)
        return {matrix.module: matrix.whole for matrix in found}

    def matrix(self, module: str, why: str) -> Matrix:
        """Give the matrix of the base that a module changes.

        Raises
        ------
        ConversionError
            When the base has none, or another shape.
        """
        base = self.base(why)
        matrix = self._matrices.get(self.in_base[module])
        if matrix is None:
            raise ConversionError(f"{module}: {why} needs its base weight; {base.path} has none")
        shape = self.adapter.stored_shape(module, matrix)
        if shape != matrix.stored_shape:
            raise ConversionError(
                f"{module}: is {shape[0]}×{shape[1]}, in {base.path} "
                f"{matrix.stored_shape[0]}×{matrix.stored_shape[1]} (out×in); is this its base?"
            )
        return matrix

    def kernel(self, module: str, why: str) -> tuple[int, ...]:
        """Give height and width of a convolution's kernel; nothing for others."""
        return self.base(why).tensors[f"{self.in_base[module]}.weight"].shape[2:]

    def w0(self, module: str, why: str) -> Tensor:
        """Read W0 of a module as (out, in), in float64."""
        matrix = self.matrix(module, why)
        return self.base(why).weight(matrix.module, matrix).double()

    def delta(self, module: str, w0: Tensor) -> Tensor:
        """Give Wt − W0 of a module, in float64."""
        matrix = self.matrix(module, "its difference")
        return self.adapter.update(module, matrix, self._base).delta(w0, slice(None))

    def carried(self, module: str) -> Change | Weight | str:
        """Give the change of a module as it is stored, or the reason why it is none of factors."""
        form = self.adapter.forms[module]
        if type(form) is Whole:
            return self._weight(module, form)
        rows = [slice(None)]
        if isinstance(form, Share):
            share = self._placed(module, form)
            form, rows = share.inner, [slice(r.start, r.stop, r.step) for r in share.rows]
        magnitude, direction = None, form
        if type(form) is Decomposed:
            if form.axis == "input":
                return "it has a magnitude per input feature"
            magnitude, direction = pick(form.magnitude.read().flatten(), rows), form.inner
        if type(direction) not in (Factors, BlockDiagonal, Nothing):
            return f"it is stored as {direction.words}"
        if self.is_embedding(module):
            return "it is an embedding"
        return self._change(module, direction, rows, magnitude)

    def is_embedding(self, module: str) -> bool:
        """Tell by its name whether a module looks rows up, for which layouts have other keys."""
        return _EMBEDDING.search(module) is not None

    def approximated(self, module: str, rank: int, scaling: float) -> Change:
        """Give the change of a rank, with a factor s, that comes next to what a module changes."""
        why = "approximating it"
        delta, kernel = self.delta(module, self.w0(module, why)), self.kernel(module, why)
        return truncated(self.name(module), delta, rank, scaling, kernel)

    def _placed(self, module: str, share: Share) -> Share:
        """Give a share of a fused projection with its rows, which only the base may tell."""
        if share.shape[0] is not None:
            return share
        why = "knowing which rows of a fused projection it is"
        return share.placed(Wanted(self.matrix(module, why), self.base(why)))

    def _change(
        self, module: str, direction: Form, rows: Sequence[slice], magnitude: Tensor | None
    ) -> Change:
        if isinstance(direction, Factors):
            a, b = direction.A.read(), direction.B.read(rows)
            kernel = _kernel_of(direction.A)
            return Change(self.name(module), a, b, direction.scaling, magnitude, kernel)
        if isinstance(direction, BlockDiagonal):
            a, b = direction.factors_of(rows)
            return Change(self.name(module), a, b, direction.scaling, magnitude)
        assert magnitude is not None
        # Nothing is multiplied with; only the base knows how many input features it has.
        none = magnitude.new_empty
        return Change(module, none(0, 0), none(len(magnitude), 0), 1.0, magnitude)

    def _weight(self, module: str, form: Whole) -> Weight:
        tensors, name = form.weight.tensors, form.weight.name
        bias = f"{name.removesuffix('weight')}bias"
        held = {"weight": name, "bias": bias} if bias in tensors else {"weight": name}
        return Weight(self.name(module), {kind: tensors.read(n) for kind, n in held.items()})


def _kernel_of(a: Stored) -> tuple[int, ...]:
    return () if a.turned else a.tensors[a.name].shape[2:]
