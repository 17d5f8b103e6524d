"""Prediction for single images: the protocol (`base`), and a predictor per task."""

from typing import TYPE_CHECKING

from vit_jax_zoo.registry import registry_of

if TYPE_CHECKING:
  from vit_jax_zoo.inference.base import Options, Predictor, Trained


def create_predictor(trained: "Trained", options: "Options") -> "Predictor":
  """Returns the predictor of a model's task; ValueError without one, or for an invalid option."""
  predictors = registry_of("task to predict with", "predictors")
  return predictors[trained.task.name](trained, options)
