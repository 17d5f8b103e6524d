"""Devices to plan for: a TPU slice by its name, or this machine's devices."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from vit_jax_zoo.errors import check_names, unknown_name
from vit_jax_zoo.training import host
from vit_jax_zoo.training.progress import peak_flops

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One JAX device; bytes, and bytes or operations per second."""

  memory: float  # main memory (HBM)
  memory_bandwidth: float
  network_bandwidth: float  # to neighbours over all links (ICI, NVLink)
  peak_flops: float  # dense, bfloat16


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
"""Name contained in `device.device_kind` -> memory, its bandwidth, bandwidth to other chips."""


def find_chip(device_kind: str) -> Chip | None:
  """Returns a device's data by `device.device_kind`, None if unknown."""
  found = [name for name in _FIGURES if re.search(rf"\b{re.escape(name)}\b", device_kind)]
  peak = peak_flops(device_kind)
  if not found or peak is None:
    return None
  return Chip(*_FIGURES[max(found, key=len)], peak_flops=peak)


PLATFORMS = ("tpu", "cpu", "cuda")

# Chips along each axis of a slice, by their number (cloud.google.com/tpu/docs, one page a version).
_SHAPES_2D: Mapping[int, str] = {
  1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
  512: "16x32", 1024: "32x32",
}  # fmt: skip
_SHAPES_3D: Mapping[int, str] = {
  4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
  512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16", 6144: "16x16x24",
}  # fmt: skip
_MAX_CHIPS = {"v2": 256, "v3": 1024, "v4": 4096, "v5e": 256, "v5p": 6144, "v6e": 256}


@dataclasses.dataclass(frozen=True)
class Machine:
  """Devices to compile for."""

  name: str  # as the user gave it, or the platform
  devices: Sequence[Any]  # real ones, or those of a topology
  kind: str  # JAX's name of the devices
  memory: float | None  # bytes per device
  chip: Chip | None  # None if unknown


def find_machine(platform: str, topology: str | None = None) -> Machine:
  """Returns the devices of one of `PLATFORMS`; "tpu" needs libtpu and a `topology`, but no TPU.

  ValueError for an unknown one, ImportError without libtpu, RuntimeError without such a device.
  """
  check_names("platform", [platform], PLATFORMS)
  if platform != "cuda" and not getattr(jax.config, "jax_platforms", None):
    jax.config.update("jax_platforms", "cpu")  # only shapes: no other backend is needed
  if platform == "tpu":
    return _tpu_slice(topology)
  if topology is not None:
    raise ValueError(f"--topology={topology} --platform={platform}: expected only one of them")
  try:
    devices = jax.devices(platform)
  except RuntimeError as error:
    raise RuntimeError(f"--platform={platform}: no such device ({error})") from None
  kind = devices[0].device_kind
  if platform == "cpu":
    memory = float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES") / len(devices)
  else:
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
  return Machine(platform, devices, kind, memory, find_chip(kind))


def find_topology(name: str | None) -> str:
  """Returns the topology of a slice, given as one or as an accelerator type of Google Cloud.

  The latter, as v5litepod-16 (v5e:4x4), counts the chips of v5e and v6e, and the two cores of each
  chip of other versions: v5p-128 is v5p:4x4x4.
  """
  if name is None:
    raise ValueError("--topology: missing; expected a TPU slice, such as --topology=v5e:4x4")
  version, separator, size = name.partition("-")
  version = "v5e" if version == "v5litepod" else version.partition(":")[0]
  if version not in _MAX_CHIPS:
    unknown = unknown_name("TPU", version, _MAX_CHIPS)
    raise ValueError(f"--topology={name}: {unknown}; expected a slice such as v5e:4x4")
  if not separator:
    return name
  shapes = _SHAPES_3D if version in ("v4", "v5p") else _SHAPES_2D
  cores = 1 if version in ("v5e", "v6e") else 2
  types = {
    str(chips * cores): f"{version}:{shape}"
    for chips, shape in shapes.items()
    if chips <= _MAX_CHIPS[version] and (chips > 1 or cores == 1)
  }
  if size not in types:
    expected = f"a size among {', '.join(types)}, or a topology such as {types['8']}"
    raise ValueError(f"--topology: unknown accelerator type {name!r}; expected {expected}")
  return types[size]


def simulated_slice(name: str | None) -> Machine:
  """Returns a slice of CPU devices, to check a config without libtpu; JAX must be unused before."""
  topology = find_topology(name)
  version, _, shape = topology.partition(":")
  if not re.fullmatch(r"\d+(x\d+)*", shape):
    raise ValueError(f"--topology: {name!r} is no slice; expected a topology such as v5e:4x4")
  chips = math.prod(int(side) for side in shape.split("x"))
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", chips * 2 if version in ("v2", "v3") else chips)
  devices = jax.devices()
  return Machine(topology, devices, devices[0].device_kind, memory=None, chip=None)


def _tpu_slice(name: str | None) -> Machine:
  topology = find_topology(name)
  version = topology.partition(":")[0]
  if importlib.util.find_spec("libtpu") is None:
    raise ImportError("libtpu: not installed; planning for a TPU needs pip install -e '.[plan]'")
  parallel = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # several planning processes, none with a TPU
  os.environ.update(host.QUIET | parallel | os.environ)
  host.hide_flags_of_others()
  options = {"chip_config_name": "megacore"} if version == "v4" else {}
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f"--topology={topology}: {str(error).splitlines()[0]}; expected one such as v5e:4x4, "
      "v5e:16x16, v5p:4x4x4, v6e:8x8, v4:2x2x2, v3:4x4"
    ) from None
  kind = found.devices[0].device_kind
  chip = find_chip(kind)
  return Machine(topology, found.devices, kind, None if chip is None else chip.memory, chip)
