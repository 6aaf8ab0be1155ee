"""Recipe → run: fine-tunes a model and keeps the checkpoints that the analysis reads."""

from wda.training.recipe import DataSource, Recipe, load_recipe
from wda.training.run import TrainingResult, finished_result, train_recipe

__all__ = [
    "DataSource",
    "Recipe",
    "TrainingResult",
    "finished_result",
    "load_recipe",
    "train_recipe",
]
