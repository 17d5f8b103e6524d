"""Shared by the benchmarks: alternating timing, medians with range, memory, tables, machine.

Alternatives are timed alternately, one short turn of each per round. Load from other processes then
affects all of them alike, and the range shows how much.
"""

import concurrent.futures
import importlib.metadata
import math
import multiprocessing
import os
import pathlib
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

Run = Callable[[int], object]
"""Runs a number of steps and waits for the last."""


class Seconds(NamedTuple):
  """Seconds of a step: wall time, and CPU time over all threads of the process."""

  wall: float
  cpu: float


def repeated(call: Callable[[], Any]) -> Run:
  """Returns a function that runs a JAX computation n times and waits for each."""
  return lambda count: [jax.block_until_ready(call()) for _ in range(count)]


def time_steps(run: Run, count: int) -> Seconds:
  """Returns the mean time of `count` steps."""
  wall, cpu = time.perf_counter(), time.process_time()
  run(count)
  return Seconds((time.perf_counter() - wall) / count, (time.process_time() - cpu) / count)


def time_rounds(run: Run, rounds: int) -> list[float]:
  """Returns the wall time of single steps, after one warm-up step."""
  run(1)
  return [time_steps(run, 1).wall for _ in range(rounds)]


def steps_for(run: Run, seconds: float) -> int:
  """Returns the number of steps that take about `seconds`, at least 1; runs two steps."""
  run(1)
  return max(1, math.ceil(seconds / max(time_steps(run, 1).wall, 1e-6)))


def alternate(
  runs: Mapping[str, Run], *, rounds: int, seconds: float, multiple: int = 1
) -> dict[str, list[Seconds]]:
  """Returns the time per step of each alternative in each round, measured alternately.

  A turn takes about `seconds`; its number of steps is a multiple of `multiple`.
  """
  counts = {
    name: multiple * math.ceil(steps_for(run, seconds) / multiple) for name, run in runs.items()
  }
  times: dict[str, list[Seconds]] = {name: [] for name in runs}
  for i in range(rounds):
    for name in list(runs)[:: -1 if i % 2 else 1]:  # reversed order in every other round
      times[name].append(time_steps(runs[name], counts[name]))
  return times


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
  """Returns `function(*args)`, computed in a new process with its own threads and memory."""
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
    return pool.submit(function, *args).result()


def resident_gb() -> float:
  """Returns the peak resident memory of this process in GB."""
  status = pathlib.Path("/proc/self/status")
  if status.exists():  # `ru_maxrss` of a new process begins at its parent's
    return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) * 1024e-9
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1e-9  # bytes on macOS


def spread(values: Sequence[float], form: str = ".3g") -> str:
  """Returns the median and the range.

  >>> spread([1.0, 3.0, 2.0], ".1f")
  '2.0 (1.0-3.0)'
  """
  middle, low, high = statistics.median(values), min(values), max(values)
  return f"{middle:{form}} ({low:{form}}-{high:{form}})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns an aligned Markdown table; all columns but the first are right-aligned."""
  widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

  def line(cells: Sequence[str]) -> str:
    first, *others = zip(cells, widths, strict=True)
    padded = [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]
    return f"| {' | '.join(padded)} |"

  rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
  return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])


def machine(*packages: str) -> str:
  """Returns the devices, cores, load average and package versions."""
  kinds = [device.device_kind for device in jax.devices()]
  device = f"{len(kinds)} x {kinds[0]}" if jax.default_backend() != "cpu" else cpu_name()
  cores = len(available_cores()) or os.cpu_count()
  load = ""
  if hasattr(os, "getloadavg"):
    load = ", load average " + " ".join(f"{value:.1f}" for value in os.getloadavg())
  versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", *packages)]
  python = f"Python {platform.python_version()}"
  return f"{device}, {cores} CPU cores{load}; {', '.join([python, *versions])}"


def available_cores() -> list[int]:
  """Returns the cores that this process may use; empty if the system does not report them."""
  return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def cpu_name() -> str:
  """Returns the processor's name."""
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return named[0] if named else platform.processor() or platform.machine()
