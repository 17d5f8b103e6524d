"""Atomic writes, JSON files, and one-line errors of a full disk (ENOSPC, EDQUOT, TensorStore's)."""

import contextlib
import errno
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# TensorStore raises ValueError, without an attribute for the errno in its message.
_FULL_CODE = re.compile(f"os_error_code='({'|'.join(map(str, _FULL))})'")


def write(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file, text as UTF-8, surrogates escaped, and renames it; by one process only."""
  path = epath.Path(path)
  encoded = content if isinstance(content, bytes) else content.encode(errors="backslashreplace")
  unfinished = path.with_name(f"{path.name}.tmp")
  unfinished.write_bytes(encoded)
  unfinished.replace(path)


def write_json(path: epath.PathLike, content: Any) -> None:
  """Writes indented JSON."""
  write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: epath.Path, advice: str = "") -> dict[str, Any] | None:
  """Returns an object of a JSON file, None if there is no file; ValueError if it is damaged."""
  try:
    is_there = path.exists() and not pathlib.Path(path).is_fifo()  # a named pipe would block
    found = json.loads(path.read_text()) if is_there else None
    if not isinstance(found, dict | None):
      raise ValueError(f"a {type(found).__name__}; expected an object")
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON ({error}){advice}") from None
  return found


def is_full(error: BaseException) -> int | None:
  """Returns the errno of a full disk's error, else None."""
  number = getattr(error, "errno", None)
  if number is None and (code := _FULL_CODE.search(str(error))):
    return int(code[1])
  return number if number in _FULL else None


@contextlib.contextmanager
def explained(what: str, advice: Callable[[], str] = lambda: "free disk space") -> Iterator[None]:
  """Raises OSError "<what>: <reason>; <advice()>" if the disk is full."""
  try:
    yield
  except (OSError, ValueError) as error:
    if (number := is_full(error)) is None:
      raise
    raise OSError(f"{what}: {os.strerror(number)}; {advice()}") from None
