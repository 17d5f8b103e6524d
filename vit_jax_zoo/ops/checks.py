"""Range checks of the fields of models and tasks."""

from typing import Any


def check_positive(owner: Any, *fields: str, hint: str = "") -> None:
  """Raises ValueError for the first number, or tuple of numbers, not positive; None is valid."""
  for field in fields:
    value = getattr(owner, field)
    if not _is_positive(value):
      raise ValueError(f"{field}: {value}; expected a positive number{hint}")


def _is_positive(value: Any) -> bool:
  if isinstance(value, tuple | list):
    return bool(value) and all(map(_is_positive, value))
  return value is None or value > 0


def check_not_negative(owner: Any, *fields: str) -> None:
  """Raises ValueError for the first field that is negative; None is valid."""
  for field in fields:
    if (value := getattr(owner, field)) is not None and value < 0:
      raise ValueError(f"{field}: {value}; expected a number of at least 0")


def check_rates(owner: Any, *fields: str) -> None:
  """Raises ValueError for the first field that is not in [0, 1)."""
  for field in fields:
    if not 0 <= (value := getattr(owner, field)) < 1:
      raise ValueError(f"{field}: {value}; expected a number in [0, 1)")


def check_fractions(owner: Any, *fields: str) -> None:
  """Raises ValueError for the first field that is not in [0, 1]."""
  for field in fields:
    if not 0 <= (value := getattr(owner, field)) <= 1:
      raise ValueError(f"{field}: {value}; expected a number in [0, 1]")


def check_num_classes(model: Any) -> None:
  """Raises ValueError if `num_classes` is neither positive nor None."""
  check_positive(model, "num_classes", hint=", or None for no head")
