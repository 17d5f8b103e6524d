"""A disk that is full, for tests."""

import contextlib
import resource


@contextlib.contextmanager
def small_files(size):
  """Lets no file of this process grow beyond `size` bytes: what is left of a disk is not enough."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
