"""Tasks by name: classification, and those of the systems."""

import dataclasses
from typing import TYPE_CHECKING, Any

from vit_jax_zoo.errors import check_fields, check_names, escape_surrogates
from vit_jax_zoo.registry import Registry, registry_of

if TYPE_CHECKING:
  from vit_jax_zoo.tasks.base import Model, Task


def tasks() -> Registry:
  """Returns the task classes by name."""
  return registry_of("task", "tasks")


def create_task(name: str, model: "Model", **fields: Any) -> "Task":
  """Returns the task of this name for a model; ValueError for unknown, missing, invalid fields."""
  task_class = tasks()[name]
  check_names(f"field of task {name!r}", fields, [*task_fields(name), "name"])
  for field in dataclasses.fields(task_class):
    required = field.default is field.default_factory is dataclasses.MISSING
    if required and field.name != "model" and fields.get(field.name) is None:
      raise ValueError(f"task {name!r}: the field {field.name!r} is required; the dataset has none")
  check_fields(f"task {name!r}", task_class, fields)
  plain = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
  if plain.get("class_names"):  # of a folder or a file of names
    plain["class_names"] = tuple(map(escape_surrogates, plain["class_names"]))
  return task_class(model=model, **plain)


def task_fields(name: str) -> tuple[str, ...]:
  """Returns the names of a task's fields, without the model."""
  return tuple(f.name for f in dataclasses.fields(tasks()[name]) if f.name != "model")
