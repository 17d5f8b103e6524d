r"""What the training loop costs beside the steps that it runs; it shall stay below 2 %.

    python benchmarks/loop_overhead.py
    python benchmarks/loop_overhead.py --workload=digits --rounds=9
    python benchmarks/loop_overhead.py --workload=photos --model=vit_s16 --image_size=224

The same compiled step, on the same mesh, in turns:

* bare: `for _ in range(n): state, metrics = step(state, batch)`, one wait at the end;
* loop: `train.loop.Loop` on that one batch: progress, checks for signals, metrics fetched and
  written to TensorBoard and metrics.jsonl, learning rates, the line on the terminal;
* loop + input: the same on batches of the run's own input pipeline. On a machine whose CPU is also
  the device, decoding takes cores from the step; elsewhere it does not;
* bare again: tells what difference is noise;
* loop around an empty step, one that returns at once. What is left is the host's own time a step,
  without the noise of the steps. Divided by the bare step it bounds the overhead: most of it hides
  behind the device, because the host runs ahead.

`digits` is the demo of configs/vit.py, `photos` a larger model on the photographs of the demos.
Evaluations and checkpoints are left out: they are not between most steps, and have their own time.
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

from vit_jax_zoo import config
from vit_jax_zoo import trainer as experiment
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.compiled_steps import Program
from vit_jax_zoo.training.loop import Loop, LoopSettings, prefetch
from vit_jax_zoo.training.metric_writer import MetricWriter, read_metrics
from vit_jax_zoo.training.progress import Progress
from vit_jax_zoo.training.train_step import TrainState

ROOT = pathlib.Path(__file__).parent.parent
PARTS = ("input_wait", "logging")


class NoCheckpoints:
  """Stands in for the checkpointer: nothing is saved, and so nothing is measured of it."""

  latest_step = None

  def save(self, *_: object) -> None:
    """Saves nothing."""

  def save_best(self, *_: object) -> None:
    """Saves nothing."""


def make_config(name: str, flags: argparse.Namespace) -> ConfigDict:
  """Returns the demo's config, or that of a larger model on photographs."""
  made = config.load(str(ROOT / "configs" / "vit.py"))
  made.data.eval = {}
  if name == "photos":
    made.model = {"name": flags.model, "num_classes": 10}
    made.batch_size = flags.batch_size
    made.data.train = {
      "source": "demo:photos",
      "split": "train",
      "transforms": [
        {"name": "random_resized_crop", "size": flags.image_size, "area": (0.05, 1.0)},
        {"name": "random_flip"},
      ],
    }
  made.log_every = flags.log_every
  return made


@dataclasses.dataclass
class Workload:
  """A run's parts, warm, and the ways in which its steps are taken.

  Attributes:
    parts: what the config stands for.
    program: its compiled steps.
    batch: a global batch.
    batches: those of the input pipeline.
    folder: for what the loop writes.
    state: the current one; every way goes on from it.
    metrics: of the last step that `bare` took.
  """

  parts: experiment.Experiment
  program: Program
  batch: Mapping[str, jax.Array]
  batches: Iterator[Any]
  folder: pathlib.Path
  state: TrainState
  metrics: Any = None

  @classmethod
  def create(cls, name: str, flags: argparse.Namespace, folder: pathlib.Path) -> "Workload":
    """Opens the data, compiles the step, and takes one."""
    parts = experiment.create(make_config(name, flags))
    first = next(parts.train_batches())
    program = parts.program(first)
    put = functools.partial(sharding.to_global, mesh=parts.mesh)
    batches = prefetch(parts.train_batches(), put)
    workload = cls(parts, program, put(first), batches, folder, program.initial_state(seed=0))
    workload.bare(1)
    return workload

  def bare(self, count: int) -> None:
    """Takes steps in a plain loop."""
    state, step, batch = self.state, self.program.train_step, self.batch
    for _ in range(count):
      state, metrics = step(state, batch)
    self.state, self.metrics = jax.block_until_ready((state, metrics))

  def loop(self, count: int) -> None:
    """Takes steps as a run does, on one batch."""
    self._run("loop", count, itertools.repeat(self.batch), self.program.train_step)

  def loop_with_input(self, count: int) -> None:
    """Takes steps as a run does, on its own batches."""
    self._run("input", count, self.batches, self.program.train_step)

  def empty(self, count: int) -> None:
    """Runs the loop around nothing."""
    metrics = self.metrics
    self._run("empty", count, itertools.repeat(self.batch), lambda state, _: (state, metrics))

  def _run(self, name: str, count: int, batches: Iterator[Any], step: Any) -> None:
    start, settings = int(self.state.step), self.parts.config
    with MetricWriter(self.folder / name, resume_step=start) as writer:
      loop = Loop(
        train_step=step,
        evaluations={},
        schedules=self.program.schedules,
        settings=LoopSettings(num_steps=start + count, log_every=settings.log_every),
        checkpointer=NoCheckpoints(),  # pyrefly: ignore
        writer=writer,
        progress=Progress(start + count, settings.batch_size, start_step=start, bar=False),
        workdir=self.folder,
      )
      self.state = jax.block_until_ready(loop.run(self.state, batches).state)


def measure(name: str, flags: argparse.Namespace) -> dict[str, str]:
  """Returns a workload's column of the table."""
  with tempfile.TemporaryDirectory() as folder:
    workload = Workload.create(name, flags, pathlib.Path(folder))
    ways = {
      "bare": workload.bare,
      "loop": workload.loop,
      "input": workload.loop_with_input,
      "again": workload.bare,
    }
    with jax.set_mesh(workload.parts.mesh), _log_into(pathlib.Path(folder) / "log"):
      times = timing.in_turns(
        ways, rounds=flags.rounds, seconds=flags.seconds, multiple=flags.log_every
      )
      times["empty"] = [
        timing.time_steps(workload.empty, 20 * flags.log_every) for _ in range(flags.rounds)
      ]
    return column(times, read_metrics(pathlib.Path(folder) / "input"))


@contextlib.contextmanager
def _log_into(path: pathlib.Path) -> Iterator[None]:
  """Sends the lines that a run would show into a file: they cost what they cost."""
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
  """Returns what is said of a workload; `logged` is what the loop itself says of its time."""
  wall = {way: [t.wall for t in rounds] for way, rounds in times.items()}
  cpu = {way: [t.cpu for t in rounds] for way, rounds in times.items()}
  step, host = statistics.median(wall["bare"]), wall["empty"]
  waits, logs = (
    [100 * r[f"speed/{part}"] for r in logged if f"speed/{part}" in r] for part in PARTS
  )
  return {
    "bare step, ms": timing.spread([1e3 * t for t in wall["bare"]]),
    "loop's step, ms": timing.spread([1e3 * t for t in wall["loop"]]),
    "loop's step with input, ms": timing.spread([1e3 * t for t in wall["input"]]),
    "loop / bare - 1": _percent_more(wall["loop"], wall["bare"]),
    "bare / bare - 1 (noise)": _percent_more(wall["again"], wall["bare"]),
    "loop / bare - 1, CPU time": _percent_more(cpu["loop"], cpu["bare"]),
    "bare / bare - 1, CPU time (noise)": _percent_more(cpu["again"], cpu["bare"]),
    "loop + input / bare - 1, CPU time": _percent_more(cpu["input"], cpu["bare"]),
    "loop around an empty step, µs": timing.spread([1e6 * t for t in host], ".0f"),
    "the same, CPU time, µs": timing.spread([1e6 * t for t in cpu["empty"]], ".0f"),
    "the same (clock) / bare step": timing.spread([100 * t / step for t in host], ".2f") + " %",
    "input wait, as logged": timing.spread(waits, ".2f") + " %",
    "logging, as logged": timing.spread(logs, ".2f") + " %",
  }


def _percent_more(times: list[float], than: list[float]) -> str:
  more = [100 * (a / b - 1) for a, b in zip(times, than, strict=True)]
  return timing.spread(more, "+.1f") + " %"


def main() -> None:
  """Measures each workload, prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--workload", default="digits,photos", help="separated by commas")
  parser.add_argument("--model", default="vit_ti16", help="of the workload `photos`")
  parser.add_argument("--image_size", type=int, default=128)
  parser.add_argument("--batch_size", type=int, default=16)
  parser.add_argument("--log_every", type=int, default=50)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--seconds", type=float, default=3.0, help="of a turn, at least")
  flags = parser.parse_args()
  print(timing.machine())
  names = flags.workload.split(",")
  columns = [measure(name, flags) for name in names]
  rows = [[key, *(column[key] for column in columns)] for key in columns[0]]
  print(f"\n{timing.markdown(['', *names], rows)}")
  print(
    f"\nmedian (range) of {flags.rounds} rounds, metrics written every {flags.log_every} steps; "
    f"afterwards: {timing.machine()}"
  )


if __name__ == "__main__":
  main()
