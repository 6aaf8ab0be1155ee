"""What a model is trained for: each task with its model, its encoding of rows and its scores."""

from __future__ import annotations

from wda.errors import ManifestError, listing
from wda.training.recipe import Recipe
from wda.training.tasks.causal import CausalLM
from wda.training.tasks.classification import Classification
from wda.training.tasks.seq2seq import Seq2Seq
from wda.training.tasks.task import Splits, Task

__all__ = ["Splits", "Task", "task_of"]

_TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "causal-lm": CausalLM,
    "seq2seq": Seq2Seq,
}


def task_of(recipe: Recipe) -> Task:
    """Give the task of a recipe.

    Raises
    ------
    ManifestError
        When models of it are counted only.
    """
    if recipe.task not in _TASKS:
        raise ManifestError(
            f"task: {recipe.task} models are counted by wda params, and not trained; choose "
            f"{listing(_TASKS)}"
        )
    return _TASKS[recipe.task](recipe)
