"""Trained models applied to images: `base` is the predictor protocol, one predictor a task."""

from typing import TYPE_CHECKING

from vit_jax_zoo.registry import registry_of

if TYPE_CHECKING:
  from vit_jax_zoo.inference.base import Options, Predictor, Trained


def create_predictor(trained: "Trained", options: "Options") -> "Predictor":
  """Returns the predictor of a model's task; ValueError if it has none, or refuses an option."""
  core = {"classification": "vit_jax_zoo.inference.classification:ClassificationPredictor"}
  predictors = registry_of("task to predict with", "predictors", core)
  return predictors[trained.task.name](trained, options)
