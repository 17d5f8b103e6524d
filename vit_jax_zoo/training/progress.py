"""Throughput, MFU, ETA, and the host's time by activity, between two reports."""

import collections
import contextlib
import datetime
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import rich.progress
from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn

from vit_jax_zoo.errors import escape_controls

_TERAFLOPS = {
  "TPU7x": 1153.5, "TPU v6 lite": 918, "TPU v6e": 918, "TPU v5 lite": 197, "TPU v5e": 197,
  "TPU v5p": 459, "TPU v5": 459, "TPU v4 lite": 138, "TPU v4": 275, "TPU v3": 61.5, "TPU v2": 22.5,
  "GB300": 2500, "B300": 2250, "GB200": 2500, "B200": 2250, "GH200": 989, "H200 NVL": 835,
  "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "H20": 148,
  "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A40": 149.7, "A30": 165,
  "A10G": 70, "A10": 125, "V100": 125, "T4": 65,
}  # fmt: skip
"""Peak dense bfloat16 TFLOP/s of a JAX device (float16 for V100 and T4), from the data sheets.

A device matches the longest name that `device.device_kind` contains as whole words: "L40" does not
match "L4". A TPU v2, v3 or 7x chip is two devices, with half of its peak each.
"""


def peak_flops(device_kind: str) -> float | None:
  """Returns the peak dense bfloat16 FLOP/s of a device, or None if unknown (CPUs).

  >>> peak_flops("NVIDIA H100 80GB HBM3")
  989000000000000.0
  """
  found = [name for name in _TERAFLOPS if re.search(rf"\b{re.escape(name)}\b", device_kind)]
  return _TERAFLOPS[max(found, key=len)] * 1e12 if found else None


class Progress:
  """Measures and logs the progress of a run, with a bar if stderr is a terminal (or `bar`).

  `batch_size` and `flops_per_step` are over all devices and hosts; `mfu` of the peak of `devices`;
  `num_examples` of the training data, for epochs.
  """

  def __init__(  # noqa: PLR0913 (by keyword, once)
    self,
    num_steps: int,
    batch_size: int,
    *,
    start_step: int = 0,
    num_examples: int = 0,
    flops_per_step: float | int | None = None,
    devices: Sequence[Any] = (),
    bar: bool | None = None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    self.num_steps, self.batch_size, self._num_examples = num_steps, batch_size, num_examples
    self._flops_per_step = flops_per_step
    self._peak = ((devices and peak_flops(devices[0].device_kind)) or 0.0) * len(devices)
    self._clock, self._start_step = clock, start_step
    self._excluded_parts: dict[str, float] = collections.defaultdict(float)  # seconds
    self._paused, self._step_time = False, 0.0
    self._begin_window(start_step)
    self._bar = None
    if sys.stderr.isatty() if bar is None else bar:
      columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
      self._bar = rich.progress.Progress(*columns, console=Console(stderr=True), transient=True)
      self._bar.add_task("train", total=num_steps, completed=start_step)
      self._bar.start()

  def close(self) -> None:
    """Removes the progress bar."""
    if self._bar is not None:
      self._bar.stop()
      self._bar = None

  @contextlib.contextmanager
  def time_as(self, part: str) -> Iterator[None]:
    """Measures the host's time in the block as `part` of the training ("input_wait")."""
    begin = self._clock()
    try:
      yield
    finally:
      if not self._paused:
        self._timed[part] += self._clock() - begin

  @contextlib.contextmanager
  def exclude(self, part: str) -> Iterator[None]:
    """Excludes the time in the block from the rates: "compile", "evaluate", "checkpoint"."""
    if self._paused:
      raise RuntimeError(f"progress.exclude({part!r}) within another exclude block")
    begin, self._paused = self._clock(), True
    try:
      yield
    finally:
      self._paused, spent = False, self._clock() - begin
      self._excluded += spent
      self._excluded_parts[part] += spent

  def report(self, step: int) -> dict[str, float]:
    """Returns the rates since the last report; {} if no step was completed.

    `step_time` (seconds), `images_per_second`, `input_wait` and other parts of `time_as` (fractions
    of the time), `mfu` (model FLOP utilisation, 0 to 1) if FLOPs and the device's peak are known.
    """
    steps = step - self._step
    seconds = self._clock() - self._begin - self._excluded
    if steps <= 0 or seconds <= 0:
      return {}
    step_time = self._step_time = seconds / steps
    rates = {"step_time": step_time, "images_per_second": self.batch_size / step_time}
    rates |= {part: spent / seconds for part, spent in self._timed.items()}
    if self._flops_per_step and self._peak:
      rates["mfu"] = self._flops_per_step / (step_time * self._peak)
    self._begin_window(step)
    return rates

  def eta_seconds(self) -> float | None:
    """Returns the estimated seconds to the end, evaluations included; None before a report."""
    done, left = self._step - self._start_step, self.num_steps - self._step
    if not self._step_time or done <= 0:
      return None
    between = sum(spent for part, spent in self._excluded_parts.items() if part != "compile")
    return left * (self._step_time + between / done)

  def line(self, step: int, metrics: Mapping[str, Any]) -> str:
    """Returns step, metrics, throughput and ETA in one line.

    >>> Progress(num_steps=1200, batch_size=64, bar=False).line(300, {"loss": 0.41234})
    'step 300/1200 (25 %) loss 0.4123'
    """
    parts = [f"step {step}/{self.num_steps} ({100 * step // max(self.num_steps, 1)} %)"]
    if self._num_examples:
      epochs = (f"{s * self.batch_size / self._num_examples:.1f}" for s in (step, self.num_steps))
      parts.append(f"epoch {'/'.join(epochs)}")
    parts += [f"{name} {value:.4g}" for name, value in metrics.items()]
    if self._step_time:
      speed = self.batch_size / self._step_time
      parts.append(f"{speed:{'.0f' if speed >= 100 else '.3g'}} images/s")
    if (eta := self.eta_seconds()) is not None:
      parts.append(f"ETA {datetime.timedelta(seconds=round(eta))}")
    return " ".join(parts)

  def log(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Logs `line`, or shows it above the progress bar, and moves the bar."""
    if self._bar is None:
      logging.info("%s", self.line(step, metrics))
      return
    line = escape_controls(self.line(step, metrics))
    self._bar.console.print(line, highlight=False, markup=False)
    self._bar.update(self._bar.task_ids[0], completed=step)

  def _begin_window(self, step: int) -> None:
    self._step, self._begin = step, self._clock()
    self._excluded, self._timed = 0.0, collections.defaultdict(float)
