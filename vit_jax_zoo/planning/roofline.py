"""How long a step takes at best: the slowest of computing, memory and network, each at its peak.

A lower bound, not a forecast. It takes for granted that the three overlap perfectly, that every
matrix product runs at the peak of its unit, that rings use all links of a chip at once, and that
the input pipeline keeps up.
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
  """Seconds of a step.

  Attributes:
    compute: for the FLOPs.
    memory: for main memory's traffic.
    network: for what goes between devices.
  """

  compute: float
  memory: float
  network: float

  @property
  def step(self) -> float:
    """The slowest of them."""
    return max(self.compute, self.memory, self.network)

  @property
  def bound(self) -> str:
    """Which is the slowest."""
    return max(("compute", "memory", "network"), key=lambda part: getattr(self, part))


def roofline(chip: Chip, *, flops: float, memory_bytes: float, network_bytes: float) -> Roofline:
  """Returns the least time of a step.

  Args:
    chip: the device.
    flops: of one device.
    memory_bytes: that one device moves to and from its memory.
    network_bytes: that one device sends to others.
  """
  return Roofline(
    compute=flops / chip.peak_flops,
    memory=memory_bytes / chip.memory_bandwidth,
    network=network_bytes / chip.network_bandwidth,
  )
