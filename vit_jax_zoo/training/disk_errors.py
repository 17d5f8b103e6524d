"""Converts ENOSPC and EDQUOT (TensorStore's too) to a one-line OSError."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# TensorStore raises ValueError, without an attribute for the errno in its message.
_FULL_CODE = re.compile(f"os_error_code='({'|'.join(map(str, _FULL))})'")


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
    number = is_full(error)
    if number is None:
      raise
    raise OSError(f"{what}: {os.strerror(number)}; {advice()}") from None
