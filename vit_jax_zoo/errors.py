"""Messages about names and types: the nearest known name, class names, escaped characters."""

import dataclasses
import difflib
import inspect
import numbers
import operator
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex


def unknown_name(kind: str, given: str, known: Iterable[str]) -> str:
  """Returns the one-line message for a misspelt name of this kind ("model").

  >>> unknown_name("optimizer", "adanw", ["sgd", "adamw"])
  "unknown optimizer 'adanw'; did you mean 'adamw'? Known: adamw, sgd"
  """
  names = sorted(known)
  lower = {name.lower(): name for name in names}
  nearest = difflib.get_close_matches(given.lower(), lower, n=1)
  nearest = nearest or [name for name in lower if len(given) > 2 and given.lower() in name]
  hint = f"; did you mean {lower[nearest[0]]!r}? Known" if nearest else "; known"
  return f"unknown {kind} {given!r}{hint}: {', '.join(names)}"


def check_names(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
  """Raises ValueError at the first of the given names that is not known; see `unknown_name`."""
  known = list(known)
  for name in given:
    if name not in known:
      raise ValueError(unknown_name(kind, str(name), known))


def field_names(kind: Any) -> list[str]:
  """Returns the fields of a dataclass, or an instance; of a Linen module without Linen's own."""
  return [f.name for f in dataclasses.fields(kind) if f.name not in ("parent", "name")]


def part_fields(part: str, kind: type, given: Mapping[str, Any] | None) -> dict[str, Any]:
  """Returns a config's fields of a part of a model ("backbone"); ValueError for an invalid one."""
  check_fields(part, kind, given or {})
  return dict(given or {})


def check_fields(owner: str, kind: type, given: Mapping[str, Any], *others: str) -> None:
  """Raises ValueError for a name not in a dataclass or `others`, or a value of another type."""
  check_names(f"field of {owner}", given, [*field_names(kind), *others])
  for field in dataclasses.fields(kind):
    if field.name in given and not _is_of(given[field.name], field.type):
      hint = inspect.formatannotation(field.type)
      expected = _TYPES.get(hint, hint.replace("collections.abc.", ""))
      raise ValueError(f"{owner}: {field.name} is {given[field.name]!r}; expected {expected}")


_TYPES = {"int": "an integer", "float": "a number", "bool": "True or False", "str": "a string"}


def _is_of(value: Any, hint: Any) -> bool:
  origin, inner = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    return any(_is_of(value, each) for each in inner)
  if origin in (tuple, list, Sequence):
    return isinstance(value, tuple | list) and all(_is_of(x, inner[0]) for x in value)
  if hint in (int, float):
    kind = numbers.Integral if hint is int else numbers.Real
    return isinstance(value, kind) and not isinstance(value, bool)
  kind = origin or hint
  return kind not in (bool, str, Mapping, types.NoneType) or isinstance(value, kind)


def name_of(index: SupportsIndex, class_names: Sequence[str]) -> str:
  """Returns a class's name, or its id without one."""
  number = operator.index(index)
  return class_names[number] if number < len(class_names) else str(number)


def shorten(name: str, length: int) -> str:
  """Returns a name, cut off at this length."""
  return name if len(name) <= length else name[: length - 1].rstrip(" ,;") + "…"


# C0 and C1 controls except tab and newline; overrides of the text's direction.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def one_line(text: str) -> str:
  """Returns text for a terminal in one line."""
  return escape_controls(" ".join(text.split()))


def escape_controls(text: str) -> str:
  r"""Returns text for a terminal: control characters, as in escape sequences, are escaped.

  >>> escape_controls("\x1b[31mred.jpg")
  '\\x1b[31mred.jpg'
  """
  return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def escape_surrogates(text: str) -> str:
  """Returns text that UTF-8 can encode; bytes that are not UTF-8 are surrogates in file names."""
  return text.encode(errors="backslashreplace").decode()
