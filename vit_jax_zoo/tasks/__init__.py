"""Tasks: loss, predictions and metrics of one kind of problem, found by name.

`tasks.base` is the protocol; classification is here, as several systems share it; each other task
lies in its system's folder.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from vit_jax_zoo.errors import check_names
from vit_jax_zoo.registry import Registry, registry_of

if TYPE_CHECKING:
  from vit_jax_zoo.tasks.base import Model, Task


def tasks() -> Registry:
  """Returns the task classes by name."""
  return registry_of(
    "task", "tasks", {"classification": "vit_jax_zoo.tasks.classification:Classification"}
  )


def create_task(name: str, model: "Model", **fields: Any) -> "Task":
  """Returns the task of this name for a model.

  Args:
    name: a key of `tasks()`.
    model: the model to train, as `create_model` returns it.
    **fields: the task's own fields, plain values as configs hold them (lists become tuples).

  Raises:
    ValueError: the task is unknown, or a field is unknown, missing or out of range.
  """
  task_class = tasks()[name]
  _check_fields(name, task_class, fields)
  plain = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
  return task_class(model=model, **plain)


def task_fields(name: str) -> tuple[str, ...]:
  """Returns the names of a task's fields, without the model."""
  return tuple(f.name for f in dataclasses.fields(tasks()[name]) if f.name != "model")


def _check_fields(name: str, task_class: type, given: dict[str, Any]) -> None:
  fields = {f.name: f for f in dataclasses.fields(task_class) if f.name != "model"}
  check_names(f"field of task {name!r}", given, [*fields, "name"])
  for key, field in fields.items():
    required = field.default is field.default_factory is dataclasses.MISSING
    if required and given.get(key) is None:
      raise ValueError(f"task {name!r} needs the field {key!r}, which the dataset does not define")
