"""Settings of glibc's malloc for XLA on CPUs."""

import contextlib
import ctypes
import importlib.metadata
import os

from vit_jax_zoo.training.libtpu import has_tpu

# Parameters of mallopt in malloc.h, and values.
_KEEP_FREED_MEMORY = (
  (-4, 0),  # M_MMAP_MAX: no allocation is a mapping of its own, which free() would return
  (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: free memory at the end of the heap is kept
  (-8, 1),  # M_ARENA_MAX: threads share the main heap; others are limited to 64 MB
)


def keep_freed_memory() -> bool:
  """Lets malloc keep memory that XLA frees; returns whether it does (glibc, no accelerator).

  By default glibc unmaps the temporaries of each call; the page faults take up to a fifth of a
  training step. Call it before JAX initialises its devices and their threads.
  """
  platforms = os.environ.get("JAX_PLATFORMS", "")
  has_accelerator = has_tpu() or bool(importlib.metadata.entry_points(group="jax_plugins"))
  if platforms.partition(",")[0] != "cpu" if platforms else has_accelerator:
    return False
  with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):
    if os.confstr("CS_GNU_LIBC_VERSION"):
      return all([ctypes.CDLL(None).mallopt(name, value) for name, value in _KEEP_FREED_MEMORY])
  return False
