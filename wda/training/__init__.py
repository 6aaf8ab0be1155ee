"""Recipe → run: fine-tunes a model and keeps the checkpoints that the analysis reads."""

from wda.training.recipe import DataSource, Recipe, load_recipe
from wda.training.run import (
    TrainingResult,
    finished_result,
    is_first_process,
    train_recipe,
)

__all__ = [
    "DataSource",
    "Recipe",
    "TrainingResult",
    "finished_result",
    "is_first_process",
    "load_recipe",
    "train_recipe",
]
