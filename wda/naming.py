"""A tensor's name → layer, module path, matrix label; fused projections split into their parts.

Every architecture has its own word for the same matrix. A label is the common word; it is what a
user asks for and what the table shows. A matrix no label fits keeps its module's own last name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from wda import fused
from wda.errors import PairingError, SelectionError, listing

LABELS = ("query", "key", "value", "output", "gate", "up", "down")

DEFAULT_LABELS = ("query", "value")

# Label → how the module path ends in the architectures that have such a matrix. The first label
# whose pattern fits wins, so the attention's output comes before the feed-forward's `down`.
_ENDINGS: dict[str, str] = {
    "query": r"q_proj|query|query_proj|q_lin|to_q|wq|q_attn|(?:SelfAttention|EncDecAttention)\.q",
    "key": r"k_proj|key|key_proj|k_lin|to_k|wk|(?:SelfAttention|EncDecAttention)\.k",
    "value": r"v_proj|value|value_proj|v_lin|to_v|wv|(?:SelfAttention|EncDecAttention)\.v",
    "output": (
        r"o_proj|out_proj|out_lin|wo_proj|attention\.output\.dense|attention\.dense"
        r"|self_attention\.dense|(?:attn|crossattention)\.c_proj|attn\.proj|to_out(?:\.0)?"
        r"|(?:SelfAttention|EncDecAttention)\.o|attention\.wo"
    ),
    "gate": r"gate_proj|mlp\.fc_1|feed_forward\.w1|DenseReluDense\.wi_0",
    "up": (
        r"up_proj|mlp\.fc_2|intermediate\.dense|fc1|lin1|c_fc|dense_h_to_4h|fc_in"
        r"|feed_forward\.w3|DenseReluDense\.wi(?:_1)?"
    ),
    "down": (
        r"down_proj|mlp\.proj|output\.dense|fc2|lin2|mlp\.c_proj|dense_4h_to_h|fc_out"
        r"|feed_forward\.w2|DenseReluDense\.wo"
    ),
}
_LABEL_PATTERNS = {
    label: re.compile(rf"(?:.*\.)?(?:{ending})$") for label, ending in _ENDINGS.items()
}

_CONV1D_NAMES = {"c_attn", "q_attn", "c_proj", "c_fc"}


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of the base, as it is stored and as it is analysed.

    Attributes
    ----------
    module : str
        Path of the module that holds it, in the base's own spelling.
    label : str
        One of :data:`LABELS`, or the module's last name where none fits.
    layer : int or None
        The first number in the module's path; None outside the stack of layers.
    stored_transposed : bool
        Whether the file holds it as (in_features, out_features), as GPT-2's ``Conv1D`` does.
    stored_shape : tuple of int
        (out_features, in_features) of the whole stored matrix.
    part : tuple of range or None
        Which of its output features are this matrix, when it is a fused projection; several ranges
        where the heads of its parts lie among each other.
    """

    module: str
    label: str
    layer: int | None
    stored_transposed: bool
    stored_shape: tuple[int, int]
    part: tuple[range, ...] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of this matrix."""
        out_features, in_features = self.stored_shape
        return sum(map(len, self.part or (range(out_features),))), in_features

    @property
    def scattered(self) -> bool:
        """Whether its rows do not lie one behind the other, so that they have to be gathered."""
        return self.part is not None and len(self.part) > 1

    @property
    def whole(self) -> Matrix:
        """The stored matrix that this one is, or is a part of."""
        return replace(self, part=None)

    def rows_of_stored(self, rows: slice | None = None) -> list[slice]:
        """Tell which rows of the stored matrix, seen as (out, in), some rows of this one are."""
        first, last, _ = (rows or slice(None)).indices(self.shape[0])
        found, passed = [], 0
        for piece in self.part or (range(self.stored_shape[0]),):
            if some := piece[max(first - passed, 0) : max(last - passed, 0)]:
                found.append(slice(some.start, some.stop, some.step))
            passed += len(piece)
        return found

    def take(self, stored: Tensor) -> Tensor:
        """Bring a stored tensor to (out_features, in_features), and to this part of it."""
        return pick(stored.T if self.stored_transposed else stored, self.rows_of_stored())

    def __str__(self) -> str:
        return self.module if self.part is None else f"{self.module} ({self.label} part)"


def pick(tensor: Tensor, rows: Sequence[slice]) -> Tensor:
    """Give some rows of a tensor one behind the other; a view where they lie so."""
    return tensor[rows[0]] if len(rows) == 1 else torch.cat([tensor[some] for some in rows])


def find_matrices(
    shapes: Mapping[str, tuple[int, ...]],
    transposed: Callable[[str, tuple[int, int]], bool] = lambda _module, _shape: False,
    config: Mapping[str, Any] = MappingProxyType({}),
) -> list[Matrix]:
    """List the weight matrices among a model's tensors.

    Parameters
    ----------
    shapes : mapping
        Tensor name → stored shape. Tensors called ``….weight`` are matrices, unless they are
        vectors; the kernel of a convolution is one of shape (out, in·kh·kw).
    transposed : callable, optional
        Says of a module and its stored shape whether it is (in_features, out_features) although
        its name does not tell; an adapter's configuration can know.
    config : mapping, optional
        The model's ``config.json``, which tells how fused projections split.

    Returns
    -------
    list of Matrix
        In the order of the layers; a fused projection gives one entry per part.
    """
    conv1d = _has_conv1d(shapes)
    found: list[Matrix] = []
    for name in sorted(shapes, key=natural_order):
        shape = shapes[name]
        if not is_matrix(name, shape):
            continue
        module = name.removesuffix(".weight")
        stored = (shape[0], math.prod(shape[1:]))
        turned = (conv1d and _last(module) in _CONV1D_NAMES) or transposed(module, stored)
        found.extend(_parts(module, stored[::-1] if turned else stored, turned, config))
    return found


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a stored tensor is a weight matrix, by its name and its dimensions."""
    return name.endswith(".weight") and len(shape) >= 2


def select(matrices: Sequence[Matrix], wanted: Iterable[str]) -> list[Matrix]:
    """Choose matrices by label, by a module's last name, or by ``re:`` and a regular expression.

    Raises
    ------
    SelectionError
        When a word selects nothing; the message lists the labels that exist.
    """
    tests = {word: _selector(word) for word in wanted}
    if not tests:
        raise SelectionError("matrices: nothing was asked for; name at least one, such as query")
    for word, test in tests.items():
        if not any(test(matrix) for matrix in matrices):
            counts = Counter(matrix.label for matrix in matrices)
            exist = listing((f"{label} ({n})" for label, n in counts.items()), most=20)
            raise SelectionError(
                f"matrices: no matrix of the base is called {word!r}; "
                f"labels that exist here: {exist or 'none'}; or use re:PATTERN on module paths"
            )
    return [matrix for matrix in matrices if any(test(matrix) for test in tests.values())]


def may_be_wanted(module: str, wanted: Iterable[str]) -> bool:
    """Tell from a module's name alone whether :func:`select` may choose a matrix of it.

    Of a projection that may fuse several matrices only its shape tells what it holds.

    Examples
    --------
    >>> may_be_wanted("layers.0.mlp.down_proj", ["query"]), may_be_wanted("h.0.c_attn", ["key"])
    (False, True)
    """
    matrix = Matrix(module, matrix_label(module), layer_index(module), False, (0, 0))
    return _last(module) in fused.NAMES or any(_selector(word)(matrix) for word in wanted)


def matrix_label(module: str) -> str:
    """Name the role of a module's matrix.

    Examples
    --------
    >>> matrix_label("bert.encoder.layer.3.attention.self.query")
    'query'
    >>> matrix_label("model.layers.0.mlp.down_proj"), matrix_label("classifier")
    ('down', 'classifier')
    """
    for label, pattern in _LABEL_PATTERNS.items():
        if pattern.match(module):
            return label
    return _last(module)


def layer_index(module: str) -> int | None:
    """Give the first number in a module's path.

    Examples
    --------
    >>> layer_index("decoder.block.2.layer.0.SelfAttention.q"), layer_index("lm_head")
    (2, None)
    """
    return next((int(word) for word in module.split(".") if word.isdigit()), None)


@dataclass(frozen=True)
class Renaming:
    """How a checkpoint's module names become the base's: one prefix goes, another comes."""

    remove: str
    add: str

    def __call__(self, module: str) -> str:
        """Spell a module's name as the base does; a name without the prefix stays."""
        if module.startswith(self.remove):
            return self.add + module.removeprefix(self.remove)
        return module


def align(modules: Iterable[str], base_modules: Iterable[str]) -> Renaming:
    """Find the renaming under which most of a checkpoint's modules exist in the base.

    A model saved with a task head carries one more prefix (``bert.``, ``model.``) than the bare
    encoder, or one less. Among equally good renamings the one that changes least wins.

    Raises
    ------
    PairingError
        When no renaming gives a single common name.
    """
    ours, theirs = set(modules), set(base_modules)
    candidates = [
        Renaming(remove, add)
        for remove in _prefixes(ours)
        for add in _prefixes(theirs)
        if not (remove and remove == add)
    ]
    overlap = {rename: len({rename(name) for name in ours} & theirs) for rename in candidates}
    best = max(candidates, key=lambda r: (overlap[r], -len(r.remove) - len(r.add)))
    if overlap[best] == 0:
        raise PairingError(
            "no module of the checkpoint has a name that exists in the base; "
            f"the checkpoint has {listing(sorted(ours), 3)}; the base has "
            f"{listing(sorted(theirs), 3)}; is this the model it was fine-tuned from?"
        )
    return best


def _prefixes(modules: Iterable[str], depth: int = 3) -> list[str]:
    """Leading dotted parts of the names, up to a depth, the empty one among them."""
    words = (module.split(".") for module in modules)
    heads = {".".join(w[:n]) + "." for w in words for n in range(1, depth + 1) if len(w) > n}
    return ["", *sorted(head for head in heads if not any(c.isdigit() for c in head.split(".")))]


def _parts(
    module: str, shape: tuple[int, int], turned: bool, config: Mapping[str, Any]
) -> list[Matrix]:
    """Give the matrix of a module, or one per part where the module fuses several."""
    layer = layer_index(module)
    if parts := fused.parts(_last(module), shape, config):
        return [Matrix(module, label, layer, turned, shape, part) for label, part in parts.items()]
    return [Matrix(module, matrix_label(module), layer, turned, shape)]


def _has_conv1d(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether a model stores GPT-2's Conv1D weights: its c_attn is wider than it is tall."""
    return any(
        _last(name.removesuffix(".weight")) == "c_attn"
        and len(shape) == 2
        and shape[1] in (2 * shape[0], 3 * shape[0])
        for name, shape in shapes.items()
    )


def _selector(word: str) -> Callable[[Matrix], bool]:
    if word.startswith("re:"):
        try:
            pattern = re.compile(word.removeprefix("re:"))
        except re.error as error:
            raise SelectionError(
                f"matrices: {word!r} is not a regular expression: {error}; see Python's re module"
            ) from None
        return lambda matrix: pattern.search(matrix.module) is not None
    return lambda matrix: word in (matrix.label, _last(matrix.module))


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def natural_order(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layer 10 after layer 9."""
    return [(0, int(word)) if word.isdigit() else (1, word) for word in name.split(".")]
