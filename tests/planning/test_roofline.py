"""Lower bound on step time; the table of chips."""

import pytest

from vit_jax_zoo.planning.hardware import GIB, Chip, find_chip
from vit_jax_zoo.planning.plan import roofline

CHIP = Chip(memory=16e9, memory_bandwidth=1e12, network_bandwidth=1e11, peak_flops=1e14)


@pytest.mark.parametrize(
  ("flops", "memory", "network", "seconds", "bound"),
  [
    (1e14, 5e11, 5e10, 1.0, "compute"),
    (1e13, 2e12, 1e10, 2.0, "memory"),
    (1e13, 1e11, 3e11, 3.0, "network"),
  ],
)
def test_step_time_of_slowest_resource(flops, memory, network, seconds, bound):
  least = roofline(CHIP, flops=flops, memory_bytes=memory, network_bytes=network)
  assert least.step == pytest.approx(seconds)
  assert least.bound == bound


@pytest.mark.parametrize(
  ("kind", "memory", "peak"),
  [
    ("TPU v2", 8 * GIB, 22.5e12),
    ("TPU v3", 16 * GIB, 61.5e12),
    ("TPU v4", 32 * GIB, 275e12),
    ("TPU v5 lite", 16 * GIB, 197e12),
    ("TPU v5", 95 * GIB, 459e12),
    ("TPU v6 lite", 32 * GIB, 918e12),
    ("NVIDIA H100 80GB HBM3", 80e9, 989e12),
  ],
)
def test_find_chip_by_jax_device_kind(kind, memory, peak):
  chip = find_chip(kind)
  assert (chip.memory, chip.peak_flops) == (memory, peak)


@pytest.mark.parametrize("kind", ["cpu", "TPU v99", "NVIDIA GeForce"])
def test_unknown_chip_is_none(kind):
  assert find_chip(kind) is None
