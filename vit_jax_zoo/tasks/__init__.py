"""What is learned, one problem a file. `create_task` finds them by name.

A task's file is imported when its task is made, so that importing the protocol (`tasks.base`)
brings no task with it.
"""

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

from vit_jax_zoo.errors import check_names, unknown_name

if TYPE_CHECKING:
  from vit_jax_zoo.tasks.base import Model, Task

TASKS = {
  "classification": ("vit_jax_zoo.tasks.classification", "Classification"),
  "detection": ("vit_jax_zoo.systems.detr.task", "Detection"),
  "instance_detection": ("vit_jax_zoo.systems.rcnn.task", "InstanceDetection"),
  "pixel_modelling": ("vit_jax_zoo.systems.igpt.task", "PixelModelling"),
  "semantic_segmentation": ("vit_jax_zoo.systems.fpt.task", "SemanticSegmentation"),
  "super_resolution": ("vit_jax_zoo.systems.ttsr.task", "SuperResolution"),
}
"""Task name -> module and class."""


def create_task(name: str, model: "Model", **fields: Any) -> "Task":
  """Returns the task of that name for a model.

  Args:
    name: a key of `TASKS`.
    model: what is to learn, as `create_model` returns it.
    **fields: the task's own fields, plain values as configs hold them (lists become tuples).

  Raises:
    ValueError: for an unknown task, or a field that is unknown, missing or out of its range.
  """
  if name not in TASKS:
    raise ValueError(unknown_name("task", name, TASKS))
  module, class_name = TASKS[name]
  task_class = getattr(importlib.import_module(module), class_name)
  _check_fields(name, task_class, fields)
  plain = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
  return task_class(model=model, **plain)


def task_fields(name: str) -> tuple[str, ...]:
  """Returns the names of a task's fields, without the model; `name` is a key of `TASKS`."""
  module, class_name = TASKS[name]
  task_class = getattr(importlib.import_module(module), class_name)
  return tuple(f.name for f in dataclasses.fields(task_class) if f.name != "model")


def _check_fields(name: str, task_class: type, given: dict[str, Any]) -> None:
  fields = {f.name: f for f in dataclasses.fields(task_class) if f.name != "model"}
  check_names(f"field of task {name!r}", given, [*fields, "name"])
  for key, field in fields.items():
    needed = field.default is field.default_factory is dataclasses.MISSING
    if needed and given.get(key) is None:
      raise ValueError(f"task {name!r} needs the field {key!r}; the data does not tell it")
