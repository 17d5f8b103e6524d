"""Settings of a process before JAX starts: libtpu without a TPU, glibc's malloc for XLA on CPUs."""

import contextlib
import ctypes
import importlib.metadata
import os
import pathlib
import re

QUIET = {
  "TPU_SKIP_MDS_QUERY": "1",  # no cloud metadata server to wait for
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Prevent libtpu's server queries and warnings; compiled programs are the same."""

_PCI, _GOOGLE = pathlib.Path("/sys/bus/pci/devices"), "0x1ae0"
# Environment variables that only TPU hosts have.
_TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_NAME", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID")
# Parameters of mallopt in malloc.h, and values.
_KEEP_FREED_MEMORY = (
  (-4, 0),  # M_MMAP_MAX: no allocation is a mapping of its own, which free() would return
  (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: free memory at the end of the heap is kept
  (-8, 1),  # M_ARENA_MAX: threads share the main heap; others are limited to 64 MB
)


def has_tpu() -> bool:
  """Returns whether the host has a TPU, by PCI device or environment."""
  vendors = (path.read_text().strip() for path in _PCI.glob("*/vendor"))
  return any(name in os.environ for name in _TPU_VARIABLES) or _GOOGLE in vendors


def silence_libtpu() -> None:
  """Suppresses libtpu's warnings about a missing TPU."""
  if not has_tpu():
    os.environ.update(QUIET)


def hide_flags_of_others() -> None:
  """Removes flags for CPUs and GPUs from XLA_FLAGS, before libtpu is loaded: it aborts at them."""
  if "XLA_FLAGS" in os.environ:
    os.environ["XLA_FLAGS"] = re.sub(r"--xla_[cg]pu_\S*", "", os.environ["XLA_FLAGS"])


def keep_freed_memory() -> bool:
  """Lets malloc keep memory that XLA frees; returns whether it does (glibc, no accelerator).

  By default glibc unmaps the temporaries of each call; the page faults take up to a fifth of a
  training step. The threads of JAX's devices must not exist yet.
  """
  platforms = os.environ.get("JAX_PLATFORMS", "")
  has_accelerator = has_tpu() or bool(importlib.metadata.entry_points(group="jax_plugins"))
  if platforms.partition(",")[0] != "cpu" if platforms else has_accelerator:
    return False
  with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):
    if os.confstr("CS_GNU_LIBC_VERSION"):
      return all([ctypes.CDLL(None).mallopt(name, value) for name, value in _KEEP_FREED_MEMORY])
  return False
