"""Roofline: lower bound on a step's time from compute, memory and network at their peaks.

Assumes perfect overlap of the three, every matrix product at peak rate, rings that use all links of
a chip, and an input pipeline that keeps up.
"""

import dataclasses

from vit_jax_zoo.planning.hardware import Chip

ASSUMPTIONS = (
  "a step takes the longest of compute, memory traffic and network traffic, each at the chip's "
  "stated peak and fully overlapped",
  "collectives are rings over all links of a chip; per device, they send (n-1)/n of an array, and "
  "twice that for an all-reduce",
  "FLOPs (matrix products and convolutions) are counted from the jaxpr, traffic from the compiled "
  "program, both with all loop iterations and recomputation (remat)",
  "evaluation, checkpoints and input are not included",
)


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds per step.

  Attributes:
    compute: FLOPs at peak rate.
    memory: main-memory traffic at peak bandwidth.
    network: traffic between devices at peak bandwidth.
  """

  compute: float
  memory: float
  network: float

  @property
  def step(self) -> float:
    """The largest of the three."""
    return max(self.compute, self.memory, self.network)

  @property
  def bound(self) -> str:
    """Name of the largest."""
    return max(("compute", "memory", "network"), key=lambda part: getattr(self, part))


def roofline(chip: Chip, *, flops: float, memory_bytes: float, network_bytes: float) -> Roofline:
  """Returns the lower bounds of a step.

  Args:
    chip: the device.
    flops: per device.
    memory_bytes: main-memory traffic per device.
    network_bytes: sent per device.
  """
  return Roofline(
    compute=flops / chip.peak_flops,
    memory=memory_bytes / chip.memory_bandwidth,
    network=network_bytes / chip.network_bandwidth,
  )
