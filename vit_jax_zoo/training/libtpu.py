"""libtpu on machines without a TPU, for the planner (the `[plan]` extra)."""

import os
import pathlib
import re

QUIET = {
  "TPU_SKIP_MDS_QUERY": "1",  # no cloud metadata server to wait for
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Prevent libtpu's server queries and warnings; compiled programs are the same."""

_PCI = pathlib.Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"
# Environment variables that only TPU hosts have.
_TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_NAME", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID")

_CPU_GPU_FLAGS = re.compile(r"--xla_[cg]pu_\S*")


def has_tpu() -> bool:
  """Returns whether the host has a TPU, by PCI device or environment."""
  vendors = (path.read_text().strip() for path in _PCI.glob("*/vendor"))
  return any(name in os.environ for name in _TPU_VARIABLES) or _GOOGLE in vendors


def silence_if_idle() -> None:
  """Suppresses libtpu's warnings about a missing TPU; call it before JAX finds its devices."""
  if not has_tpu():
    os.environ.update(QUIET)


def hide_flags_of_others() -> None:
  """Removes flags for CPUs and GPUs from XLA_FLAGS, before libtpu is loaded: it aborts at them."""
  if "XLA_FLAGS" in os.environ:
    os.environ["XLA_FLAGS"] = _CPU_GPU_FLAGS.sub("", os.environ["XLA_FLAGS"])
