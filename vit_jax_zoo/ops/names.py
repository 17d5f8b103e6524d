"""Messages for names that are not known: one line with the nearest known name and the list."""

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, given: str, known: Iterable[str]) -> str:
  """Returns the one-line message for a misspelt name.

  Args:
    kind: what was named, as a noun: "model", "transform", "config field".
    given: the name as the user wrote it.
    known: the names that would have been accepted.

  >>> unknown_name("optimizer", "adanw", ["sgd", "adamw"])
  "unknown optimizer 'adanw'; did you mean 'adamw'? Known: adamw, sgd"
  """
  names = sorted(known)
  nearest = difflib.get_close_matches(given, names, n=1)
  hint = f"; did you mean {nearest[0]!r}? Known" if nearest else "; known"
  return f"unknown {kind} {given!r}{hint}: {', '.join(names)}"
