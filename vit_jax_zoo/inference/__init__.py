"""Models at work on a user's own pictures: one file a task, found by the task's name."""

import importlib
from typing import TYPE_CHECKING

from vit_jax_zoo.errors import unknown_name
from vit_jax_zoo.tasks import TASKS

if TYPE_CHECKING:
  from vit_jax_zoo.inference.base import Options, Predictor, Trained

PREDICTORS = {
  "classification": ("vit_jax_zoo.tasks.classification_predictor", "ClassificationPredictor"),
  "detection": ("vit_jax_zoo.systems.detr.predictor", "DetectionPredictor"),
  "instance_detection": ("vit_jax_zoo.systems.rcnn.predictor", "InstancePredictor"),
  "pixel_modelling": ("vit_jax_zoo.systems.igpt.predictor", "CompletionPredictor"),
  "semantic_segmentation": ("vit_jax_zoo.systems.fpt.predictor", "SegmentationPredictor"),
  "super_resolution": ("vit_jax_zoo.systems.ttsr.predictor", "SuperResolutionPredictor"),
}
"""Name of the task, a key of `tasks.TASKS` -> module and class of its predictor."""


def create_predictor(trained: "Trained", options: "Options") -> "Predictor":
  """Returns the predictor of a model's task.

  Raises:
    ValueError: there is none for this task, or the model cannot do what the options ask for.
  """
  task_class = type(trained.task).__name__
  task = next((name for name, (_, known) in TASKS.items() if known == task_class), task_class)
  if task not in PREDICTORS:
    raise ValueError(unknown_name("task to predict with", task, PREDICTORS))
  module, class_name = PREDICTORS[task]
  return getattr(importlib.import_module(module), class_name)(trained, options)
