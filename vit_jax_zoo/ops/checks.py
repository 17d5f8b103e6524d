"""Range checks of the fields of models and tasks."""

from collections.abc import Callable, Iterable
from typing import Any


def check_positive(owner: Any, *fields: str, hint: str = "") -> None:
  """Raises ValueError for the first number, or tuple of numbers, not positive; None is valid."""
  _check(owner, fields, _is_positive, f"a positive number{hint}")


def _is_positive(value: Any) -> bool:
  if isinstance(value, tuple | list):
    return bool(value) and all(map(_is_positive, value))
  return value is None or value > 0


def check_not_negative(owner: Any, *fields: str) -> None:
  """Raises ValueError for the first field that is negative; None is valid."""
  _check(owner, fields, lambda x: x is None or not x < 0, "a number of at least 0")


def check_rates(owner: Any, *fields: str) -> None:
  """Raises ValueError for the first field that is not in [0, 1)."""
  _check(owner, fields, lambda x: 0 <= x < 1, "a number in [0, 1)")


def check_fractions(owner: Any, *fields: str) -> None:
  """Raises ValueError for the first field that is not in [0, 1]."""
  _check(owner, fields, lambda x: 0 <= x <= 1, "a number in [0, 1]")


def _check(owner: Any, fields: Iterable[str], is_valid: Callable[[Any], bool], what: str) -> None:
  for field in fields:
    if not is_valid(value := getattr(owner, field)):
      raise ValueError(f"{field}: {value}; expected {what}")
