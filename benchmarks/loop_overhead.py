r"""Overhead of the training loop over its compiled step; the target is below 2 %.

    python benchmarks/loop_overhead.py
    python benchmarks/loop_overhead.py --workload=digits --rounds=9
    python benchmarks/loop_overhead.py --workload=photos --model=vit_s16 --image_size=224

The same compiled step runs alternately in

* bare: `for _ in range(n): state, metrics = step(state, batch)`, with one wait at the end;
* loop: `training.loop.Loop` on one batch, with signal checks, metrics to TensorBoard and
  metrics.jsonl, learning rates and the progress line;
* loop with input: the same on the batches of the input pipeline. Where the CPU is also the device,
  decoding takes cores from the step;
* bare again: the difference to bare is noise;
* empty: the loop around a step that returns at once: the host's time per step, which bounds the
  overhead, as the host runs ahead of the device.

`digits` is the demo of configs/vit.py, `photos` a larger model on the demo photographs. Evaluations
and checkpoints are not included.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import timing
from absl import logging
from ml_collections import ConfigDict

from vit_jax_zoo import builder
from vit_jax_zoo import config as config_lib
from vit_jax_zoo.training import host, sharding
from vit_jax_zoo.training.loop import Loop, LoopSettings, prefetch
from vit_jax_zoo.training.metric_writer import MetricWriter, read_metrics
from vit_jax_zoo.training.progress import Progress
from vit_jax_zoo.training.train_step import Program, TrainState

ROOT = pathlib.Path(__file__).parent.parent
PARTS = ("input_wait", "logging")


class NoCheckpoints:
  """A checkpointer that saves nothing."""

  latest_step = None

  def __init__(self, workdir: pathlib.Path) -> None:
    self.workdir = workdir

  def save(self, *_: object) -> None:
    """Does nothing."""

  def save_best(self, *_: object) -> None:
    """Does nothing."""


def make_config(name: str, flags: argparse.Namespace) -> ConfigDict:
  """Returns the config of a workload: the demo, or a larger model on photographs."""
  config = config_lib.load(str(ROOT / "configs" / "vit.py"))
  config.data.eval = {}
  if name == "photos":
    config.model = {"name": flags.model, "num_classes": 10}
    config.batch_size = flags.batch_size
    config.data.train = {
      "source": "demo:photos",
      "split": "train",
      "transforms": [
        {"name": "random_resized_crop", "size": flags.image_size, "area": (0.05, 1.0)},
        {"name": "random_flip"},
      ],
    }
  config.log_every = flags.log_every
  return config


@dataclasses.dataclass
class Workload:
  """An experiment after its first step, and the loops around its step."""

  parts: builder.Experiment
  program: Program
  batch: Mapping[str, jax.Array]  # global
  batches: Iterator[Any]  # of the input pipeline
  folder: pathlib.Path  # of the loop's files
  state: TrainState  # updated by every loop
  metrics: Any = None  # of the last bare step

  @classmethod
  def create(cls, name: str, flags: argparse.Namespace, folder: pathlib.Path) -> "Workload":
    """Opens the data, compiles the step and runs it once."""
    parts = builder.build(make_config(name, flags))
    first = next(parts.train_batches())
    program = parts.program(first)
    put = functools.partial(sharding.to_global, mesh=parts.mesh)
    batches = prefetch(parts.train_batches(), put)
    workload = cls(parts, program, put(first), batches, folder, program.initial_state(seed=0))
    workload.bare(1)
    return workload

  def bare(self, count: int) -> None:
    """Runs a plain for loop."""
    state, step, batch = self.state, self.program.train_step, self.batch
    for _ in range(count):
      state, metrics = step(state, batch)
    self.state, self.metrics = jax.block_until_ready((state, metrics))

  def loop(self, count: int) -> None:
    """Runs the training loop on one batch."""
    self._run("loop", count, itertools.repeat(self.batch), self.program.train_step)

  def loop_with_input(self, count: int) -> None:
    """Runs the training loop on the input pipeline."""
    self._run("input", count, self.batches, self.program.train_step)

  def empty(self, count: int) -> None:
    """Runs the training loop around an empty step."""
    metrics = self.metrics
    self._run("empty", count, itertools.repeat(self.batch), lambda state, _: (state, metrics))

  def _run(self, name: str, count: int, batches: Iterator[Any], step: Any) -> None:
    start, settings = int(self.state.step), self.parts.config
    with MetricWriter(self.folder / name, resume_step=start) as writer:
      loop = Loop(
        program=dataclasses.replace(self.program, train_step=step),
        evaluations={},
        settings=LoopSettings(num_steps=start + count, log_every=settings.log_every),
        checkpointer=NoCheckpoints(self.folder),  # pyrefly: ignore
        writer=writer,
        progress=Progress(start + count, settings.batch_size, start_step=start, bar=False),
      )
      self.state = jax.block_until_ready(loop.run(self.state, batches).state)


def measure(name: str, flags: argparse.Namespace) -> dict[str, str]:
  """Returns the column of a workload."""
  with tempfile.TemporaryDirectory() as folder:
    workload = Workload.create(name, flags, pathlib.Path(folder))
    runs = {
      "bare": workload.bare,
      "loop": workload.loop,
      "input": workload.loop_with_input,
      "again": workload.bare,
    }
    with jax.set_mesh(workload.parts.mesh), _log_into(pathlib.Path(folder) / "log"):
      times = timing.alternate(
        runs, rounds=flags.rounds, seconds=flags.seconds, multiple=flags.log_every
      )
      times["empty"] = [
        timing.time_steps(workload.empty, 20 * flags.log_every) for _ in range(flags.rounds)
      ]
    return column(times, read_metrics(pathlib.Path(folder) / "input"))


@contextlib.contextmanager
def _log_into(path: pathlib.Path) -> Iterator[None]:
  """Redirects log lines to a file, so that their cost is included."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler().python_handler
  with path.open("w") as file:
    before = handler.setStream(file)
    try:
      yield
    finally:
      handler.setStream(before)
      logging.set_verbosity(logging.WARNING)


def column(times: dict[str, list[timing.Seconds]], logged: list[dict[str, Any]]) -> dict[str, str]:
  """Returns the figures of a workload by row; `logged` are the metrics that the loop wrote."""
  wall = {name: [t.wall for t in rounds] for name, rounds in times.items()}
  cpu = {name: [t.cpu for t in rounds] for name, rounds in times.items()}
  step, host = statistics.median(wall["bare"]), wall["empty"]
  waits, logs = (
    [100 * r[f"speed/{part}"] for r in logged if f"speed/{part}" in r] for part in PARTS
  )
  return {
    "bare step, ms": timing.spread([1e3 * t for t in wall["bare"]]),
    "loop, ms per step": timing.spread([1e3 * t for t in wall["loop"]]),
    "loop with input, ms per step": timing.spread([1e3 * t for t in wall["input"]]),
    "loop / bare - 1": _percent_more(wall["loop"], wall["bare"]),
    "bare / bare - 1 (noise)": _percent_more(wall["again"], wall["bare"]),
    "loop / bare - 1, CPU time": _percent_more(cpu["loop"], cpu["bare"]),
    "bare / bare - 1, CPU time (noise)": _percent_more(cpu["again"], cpu["bare"]),
    "loop with input / bare - 1, CPU time": _percent_more(cpu["input"], cpu["bare"]),
    "empty step, µs": timing.spread([1e6 * t for t in host], ".0f"),
    "empty step, CPU time, µs": timing.spread([1e6 * t for t in cpu["empty"]], ".0f"),
    "empty step / bare step": timing.spread([100 * t / step for t in host], ".2f") + " %",
    "input wait, fraction of the run": timing.spread(waits, ".2f") + " %",
    "logging, fraction of the run": timing.spread(logs, ".2f") + " %",
  }


def _percent_more(times: list[float], than: list[float]) -> str:
  more = [100 * (a / b - 1) for a, b in zip(times, than, strict=True)]
  return timing.spread(more, "+.1f") + " %"


def main() -> None:
  """Measures every workload and prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--workload", default="digits,photos", help="separated by commas")
  parser.add_argument("--model", default="vit_ti16", help="model of `photos`")
  parser.add_argument("--image_size", type=int, default=128)
  parser.add_argument("--batch_size", type=int, default=16)
  parser.add_argument("--log_every", type=int, default=50)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--seconds", type=float, default=3.0, help="minimum length of a turn")
  flags = parser.parse_args()
  host.keep_freed_memory()  # as the commands do
  print(timing.machine())
  names = flags.workload.split(",")
  columns = [measure(name, flags) for name in names]
  rows = [[key, *(column[key] for column in columns)] for key in columns[0]]
  print(f"\n{timing.markdown(['', *names], rows)}")
  print(
    f"\nmedian (range) of {flags.rounds} rounds, metrics written every {flags.log_every} steps; "
    f"at the end: {timing.machine()}"
  )


if __name__ == "__main__":
  main()
