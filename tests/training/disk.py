"""Simulates a full disk."""

import contextlib
import resource


@contextlib.contextmanager
def small_files(size):
  """Limits every file that this process writes to `size` bytes."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
