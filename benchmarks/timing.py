"""What the benchmarks share: the machine in words, turns, medians with their range, tables.

Whatever is compared is measured in turns, one short run of each after the other, over and over: a
machine that others use as well then disturbs all of them alike, and the range says how much.
"""

import importlib.metadata
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax


class Seconds(NamedTuple):
  """How long a step took: by the clock, and in CPU time over all threads of the process."""

  wall: float
  cpu: float


def time_steps(run: Callable[[int], object], count: int) -> Seconds:
  """Returns the time of each of `count` steps; `run(count)` takes them, and waits for the last."""
  wall, cpu = time.perf_counter(), time.process_time()
  run(count)
  return Seconds((time.perf_counter() - wall) / count, (time.process_time() - cpu) / count)


def steps_for(run: Callable[[int], object], seconds: float) -> int:
  """Returns how many steps fill so many seconds, at least 1; runs a few to find out."""
  run(1)
  return max(1, math.ceil(seconds / max(time_steps(run, 1).wall, 1e-6)))


def in_turns(
  runs: Mapping[str, Callable[[int], object]], *, rounds: int, seconds: float, multiple: int = 1
) -> dict[str, list[Seconds]]:
  """Measures everything once in each round.

  Args:
    runs: by name; each takes a number of steps, and waits for the last.
    rounds: how often.
    seconds: how long each turn shall last, about.
    multiple: the steps of a turn are a multiple of this.

  Returns:
    For each name, the time of a step in each round.
  """
  counts = {
    name: multiple * math.ceil(steps_for(run, seconds) / multiple) for name, run in runs.items()
  }
  times: dict[str, list[Seconds]] = {name: [] for name in runs}
  for i in range(rounds):
    for name in list(runs)[:: -1 if i % 2 else 1]:  # so that none always comes after another
      times[name].append(time_steps(runs[name], counts[name]))
  return times


def spread(values: Sequence[float], form: str = ".3g") -> str:
  """Returns the median, and the range in brackets.

  >>> spread([1.0, 3.0, 2.0], ".1f")
  '2.0 (1.0-3.0)'
  """
  middle, low, high = statistics.median(values), min(values), max(values)
  return f"{middle:{form}} ({low:{form}}-{high:{form}})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table whose columns stand under each other, numbers to the right."""
  widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

  def line(cells: Sequence[str]) -> str:
    first, *others = zip(cells, widths, strict=True)
    padded = [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]
    return f"| {' | '.join(padded)} |"

  rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
  return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])


def machine(*packages: str) -> str:
  """Returns what was measured on: devices, cores, how busy they are, versions."""
  kinds = [device.device_kind for device in jax.devices()]
  device = f"{len(kinds)} x {kinds[0]}" if jax.default_backend() != "cpu" else cpu_name()
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  load = ""
  if hasattr(os, "getloadavg"):
    load = ", load average " + " ".join(f"{value:.1f}" for value in os.getloadavg())
  versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", *packages)]
  python = f"Python {platform.python_version()}"
  return f"{device}, {cores} CPU cores{load}; {', '.join([python, *versions])}"


def cpu_name() -> str:
  """Returns the processor's name."""
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return named[0] if named else platform.processor() or platform.machine()
