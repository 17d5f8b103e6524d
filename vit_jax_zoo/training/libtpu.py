"""libtpu on machines without a TPU, where it is to plan for one (the `[plan]` extra)."""

import os
import pathlib
import re

QUIET = {
  "TPU_SKIP_MDS_QUERY": "1",  # no cloud metadata server to wait for
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_HOSTNAMES": "localhost",
}
"""What libtpu would otherwise ask for, or complain of; of no consequence for what it compiles."""

_PCI = pathlib.Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"
_TELLING = ("TPU_ACCELERATOR_TYPE", "TPU_NAME", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID")
"""What stands in the environment of TPU hosts. (JAX sets others itself, anywhere.)"""

_FLAGS_OF_OTHERS = re.compile(r"--xla_[cg]pu_\S*")


def has_tpu() -> bool:
  """Whether a TPU is plugged in, or the environment speaks of one."""
  vendors = (path.read_text().strip() for path in _PCI.glob("*/vendor"))
  return any(name in os.environ for name in _TELLING) or _GOOGLE in vendors


def silence_if_idle() -> None:
  """Keeps libtpu from several lines of complaints, at every start, that there is no TPU.

  Call it before JAX looks for devices. It does nothing where there is a TPU.
  """
  if not has_tpu():
    os.environ.update(QUIET)


def hide_flags_of_others() -> None:
  """Takes the flags for CPUs and GPUs out of XLA_FLAGS: libtpu ends the process at an unknown one.

  Call it before libtpu is loaded. What a TPU's program looks like does not depend on them.
  """
  if "XLA_FLAGS" in os.environ:
    os.environ["XLA_FLAGS"] = _FLAGS_OF_OTHERS.sub("", os.environ["XLA_FLAGS"])
