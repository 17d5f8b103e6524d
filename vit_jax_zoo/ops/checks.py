"""Checks of fields, shared by models and tasks; each message names the field."""

from typing import Any


def check_positive(owner: Any, *fields: str, hint: str = "") -> None:
  """Raises ValueError at the first of these fields that is below 1; one that is None passes.

  Args:
    owner: what has the fields.
    *fields: their names.
    hint: ends the message: what else could be given.
  """
  for field in fields:
    value = getattr(owner, field)
    if value is not None and value < 1:
      raise ValueError(f"{field} must be positive, not {value}{hint and f'; {hint}'}")


def check_num_classes(model: Any) -> None:
  """Raises ValueError if a model's `num_classes` is neither positive nor None."""
  check_positive(model, "num_classes", hint="None leaves out the head")
