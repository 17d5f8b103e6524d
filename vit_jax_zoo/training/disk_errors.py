"""A full disk is said to be one, in one line, with what was to be written and what to do."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator

_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PLACE_CODE = re.compile(f"os_error_code='({'|'.join(map(str, _NO_PLACE))})'")  # TensorStore's


def is_full(error: BaseException) -> int | None:
  """Returns the number of the system's error, if there is no place left; else None."""
  code = _NO_PLACE_CODE.search(str(error))
  number = int(code[1]) if code else getattr(error, "errno", None)
  return number if number in _NO_PLACE else None


@contextlib.contextmanager
def explained(what: str, advice: Callable[[], str] = lambda: "make room") -> Iterator[None]:
  """Says of a full disk that it is full, and what to do.

  Args:
    what: begins the message: "a checkpoint cannot be written to /runs/vit".
    advice: ends it.

  Raises:
    OSError: in place of whatever is raised where there is no place left.
  """
  try:
    yield
  except (OSError, ValueError) as error:
    number = is_full(error)
    if number is None:
      raise
    raise OSError(f"{what}: {os.strerror(number)}; {advice()}") from None
