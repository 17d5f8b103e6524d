"""What accelerators can do, as their makers state it.

TPU figures: cloud.google.com/tpu/docs, the pages of v3, v4, v5e, v5p and v6e; bandwidth between
chips of v2 and v3 from Jouppi et al., "A domain-specific supercomputer for training deep neural
networks" (CACM 2020), 4 links of 496 and 656 Gbit/s, and of v4 from Jouppi et al.,
arXiv:2304.01433, 6 links of 50 GB/s. The pages state both directions of a link together; half of
that stands here. NVIDIA's: its data sheets of the SXM modules; NVLink likewise.

Everything is of one JAX device. A v2 or v3 chip is two of them, a v4 or v5p chip is one here.
"""

import dataclasses
import re
from collections.abc import Mapping

from vit_jax_zoo.train.progress import peak_flops

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One JAX device.

  Attributes:
    memory: bytes of its main memory (HBM).
    memory_bandwidth: bytes a second to and from it.
    network_bandwidth: bytes a second that it can send to neighbours, over all its links together
      (ICI, NVLink).
    peak_flops: dense bfloat16 operations a second.
  """

  memory: float
  memory_bandwidth: float
  network_bandwidth: float
  peak_flops: float


_FIGURES: Mapping[str, tuple[float, float, float]] = {
  "TPU v2": (8 * GIB, 350e9, 124e9),
  "TPU v3": (16 * GIB, 450e9, 164e9),
  "TPU v4": (32 * GIB, 1200e9, 300e9),
  "TPU v5 lite": (16 * GIB, 819e9, 200e9),
  "TPU v5": (95 * GIB, 2765e9, 600e9),
  "TPU v5p": (95 * GIB, 2765e9, 600e9),
  "TPU v6 lite": (32 * GIB, 1638e9, 400e9),
  "A100-SXM4-40GB": (40e9, 1555e9, 300e9),
  "A100-SXM4-80GB": (80e9, 2039e9, 300e9),
  "H100 80GB HBM3": (80e9, 3350e9, 450e9),
  "H200": (141e9, 4800e9, 450e9),
}
"""By what stands in `device.device_kind`: memory, its bandwidth, bandwidth to other chips."""


def find_chip(device_kind: str) -> Chip | None:
  """Returns what is known of a device, None if that is too little for an estimate.

  >>> find_chip("TPU v5 lite").memory == 16 * GIB, find_chip("cpu")
  (True, None)
  """
  found = [name for name in _FIGURES if re.search(rf"\b{re.escape(name)}\b", device_kind)]
  peak = peak_flops(device_kind)
  if not found or peak is None:
    return None
  return Chip(*_FIGURES[max(found, key=len)], peak_flops=peak)
