"""Which modules of a model an adapter can go into, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

from torch import Tensor, nn

from wda.adapters.bottleneck import BottleneckLayer
from wda.adapters.frozen import Frozen
from wda.adapters.kinds import kind_of
from wda.adapters.layer import AdaptedLayer
from wda.adapters.packed import packed_kind
from wda.errors import SelectionError, listing
from wda.naming import Matrix, find_matrices, select


def choose(model: nn.Module, wanted: Sequence[str], field: str = "targets") -> list[str]:
    """Choose modules by what a recipe calls them.

    Parameters
    ----------
    model : nn.Module
        The model.
    wanted : sequence of str
        Labels, modules' last names or ``re:`` and a pattern.
    field : str
        The recipe's field these words stand in.

    Returns
    -------
    list of str
        Their paths, sorted.

    Raises
    ------
    SelectionError
        When a word chooses nothing, what it chooses cannot be adapted, or shares its weight.
    """
    matrices = find_matrices(_shapes(model))
    chosen = _select(matrices, wanted, field)
    modules = sorted({matrix.module for matrix in chosen})
    _refuse_other_kinds(model, modules, field)
    _refuse_parts(matrices, chosen, field)
    _refuse_tied(model, modules, field)
    return modules


def check_rank(model: nn.Module, modules: Iterable[str], rank: int) -> None:
    """Refuse a rank that a matrix cannot have.

    Raises
    ------
    SelectionError
        Naming the smallest of the matrices.
    """
    shapes = {module: frozen_layer(model, module).shape for module in modules}
    smallest = min(shapes, key=lambda module: min(shapes[module]))
    most = min(shapes[smallest])
    if rank > most:
        raise SelectionError(
            f"rank: {rank} is more than {smallest} can have, whose weight is "
            f"{' × '.join(map(str, shapes[smallest]))}; choose at most {most}"
        )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Give the shapes of all of the model's own parameters, of shared ones under each name."""
    shapes = {name: tuple(parameter.shape) for name, parameter in _own_parameters(model)}
    packed = {
        f"{name}.weight": kind(layer).shape
        for name, layer in model.named_modules()
        if (kind := packed_kind(layer)) is not None
    }
    return shapes | {name.replace(".base_layer.", "."): s for name, s in packed.items()}


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give the parameters as they were called before there were adapters."""
    adapted = [name for name, m in model.named_modules() if isinstance(m, AdaptedLayer)]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module = next((a for a in adapted if name.startswith(f"{a}.")), None)
        if module is None:
            yield name, parameter
        elif name.startswith(f"{module}.base_layer."):
            yield name.replace(f"{module}.base_layer.", f"{module}.", 1), parameter


def _select(matrices: Sequence[Matrix], wanted: Sequence[str], field: str) -> list[Matrix]:
    for word in wanted:
        try:
            select(matrices, [word])
        except SelectionError as error:
            near = get_close_matches(word.removeprefix("re:"), _names(matrices), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            message = str(error).removeprefix("matrices: ")
            raise SelectionError(f"{field}: {message}{hint}") from None
    return select(matrices, wanted)


def _names(matrices: Sequence[Matrix]) -> list[str]:
    """Give every word that would choose something."""
    last = (matrix.module.rpartition(".")[2] for matrix in matrices)
    return sorted({*last, *(matrix.label for matrix in matrices)})


def _refuse_other_kinds(model: nn.Module, modules: Sequence[str], field: str) -> None:
    layers = {module: base_layer(model, module) for module in modules}
    if others := [m for m, layer in layers.items() if kind_of(layer) is None]:
        kinds = sorted({type(layers[m]).__name__ for m in others})
        raise SelectionError(
            f"{field}: adapters go into nn.Linear, GPT-2's Conv1D, nn.Embedding, nn.Conv1d and "
            f"nn.Conv2d; {listing(others, 4)} are {listing(kinds)}; choose other {field}"
        )
    grouped = [m for m, layer in layers.items() if getattr(layer, "groups", 1) != 1]
    if grouped:
        raise SelectionError(
            f"{field}: {listing(grouped, 4)} convolve in groups, each with a small matrix of its "
            f"own, to which no update of low rank belongs; choose other {field}"
        )
    clipped = [m for m, layer in layers.items() if getattr(layer, "max_norm", None) is not None]
    if clipped:
        raise SelectionError(
            f"{field}: {listing(clipped, 4)} shorten their vectors in every forward pass "
            f"(max_norm), so there is no W0; choose other {field}"
        )
    unpacked = [m for m in modules if not frozen_layer(model, m).packed]
    packed = [m for m in unpacked if not _weight(model, m).is_floating_point()]
    if packed:
        raise SelectionError(
            f"{field}: the weights of {listing(packed, 4)} are {_weight(model, packed[0]).dtype}, "
            "packed numbers that are not bitsandbytes'; load the model in float32, bfloat16 or "
            "float16, or quantised by bitsandbytes"
        )


def _refuse_parts(matrices: Sequence[Matrix], chosen: Sequence[Matrix], field: str) -> None:
    """Refuse some parts of a fused projection, of which an adapter trains all."""
    labels = {
        matrix.module: [m.label for m in matrices if m.module == matrix.module] for matrix in chosen
    }
    for module, all_of_it in labels.items():
        asked = [matrix.label for matrix in chosen if matrix.module == module]
        if asked != all_of_it:
            raise SelectionError(
                f"{field}: {module} holds {listing(all_of_it)} in one matrix, and an adapter "
                f"trains all of it, not {listing(asked)} alone; choose {listing(all_of_it)}, or "
                f"{module.rpartition('.')[2]}"
            )


def _refuse_tied(model: nn.Module, modules: Sequence[str], field: str) -> None:
    """Refuse a weight that two modules share: adapted in one, it would differ from the other."""
    chosen = {id(_weight(model, module)): module for module in modules}
    for name, parameter in _own_parameters(model):
        module = chosen.get(id(parameter), "")
        other = name.rpartition(".")[0]
        if module and other != module:
            raise SelectionError(
                f"{field}: {module} shares its weight with {other}, which an adapter would "
                f"separate; choose other {field}, or untie the two (tie_word_embeddings: false)"
            )


def base_layer(model: nn.Module, module: str) -> nn.Module:
    """Give a model's layer, without the adapters it may have."""
    layer = model.get_submodule(module)
    return layer.base_layer if isinstance(layer, AdaptedLayer | BottleneckLayer) else layer


def frozen_layer(model: nn.Module, module: str) -> Frozen:
    """See a model's layer as a matrix; it is one that :func:`choose` gave."""
    layer = base_layer(model, module)
    kind = kind_of(layer)
    assert kind is not None
    return kind(layer)


def _weight(model: nn.Module, module: str) -> Tensor:
    weight = base_layer(model, module).weight
    assert isinstance(weight, Tensor)
    return weight
