"""The training loop: train steps, logging, checkpoints, evaluations, in this order in each step.

Outputs of step N belong to the state after N steps, and data are a function of the step: a resumed
run repeats the lost steps and ends bit-identical to an uninterrupted one. A state is saved before
it is evaluated; a missing evaluation is run when the run resumes.
"""

import collections
import contextlib
import dataclasses
import json
import math
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from vit_jax_zoo.errors import check_names
from vit_jax_zoo.tasks.base import Variables
from vit_jax_zoo.training import disk
from vit_jax_zoo.training.checkpoint import BEST, Checkpointer, find_checkpoint, restore_variables
from vit_jax_zoo.training.distributed import all_gather_objects, is_primary
from vit_jax_zoo.training.evaluate import Evaluation, Report
from vit_jax_zoo.training.metric_writer import METRICS_FILE, MetricWriter, read_metrics
from vit_jax_zoo.training.progress import Progress
from vit_jax_zoo.training.train_step import Metrics, Program, TrainState

PENDING_FILE = "pending_metrics.json"  # sums of training metrics since the last row, at SIGTERM


@contextlib.contextmanager
def preemption_guard() -> Iterator[Callable[[int], bool]]:
  """Yields a function, for all processes to call after each step, that returns whether to stop.

  In a single process, SIGTERM and the first Ctrl-C set a flag. With `jax.distributed`, JAX handles
  SIGTERM and synchronises the step at which all hosts stop; Ctrl-C interrupts immediately.
  """
  stop, old_handlers = threading.Event(), {}
  has_service = getattr(jax.config, "jax_enable_preemption_service", False)
  by_jax = jax.distributed.is_initialized() and has_service

  def requested(step: int) -> bool:
    if by_jax and not stop.is_set() and multihost_utils.reached_preemption_sync_point(step):
      stop.set()
    return stop.is_set()

  def on_signal(number: int, _: FrameType | None) -> None:
    stop.set()
    if number == signal.SIGINT:  # the next Ctrl-C interrupts immediately
      signal.signal(number, old_handlers[number])

  if threading.current_thread() is threading.main_thread() and not by_jax:
    for number in (signal.SIGTERM, signal.SIGINT):
      old_handlers[number] = signal.signal(number, on_signal) or signal.SIG_DFL
  elif not by_jax:
    logging.warning("not in the main thread: SIGTERM ends this run without a checkpoint")
  try:
    yield requested
  finally:
    for number, old in old_handlers.items():
      signal.signal(number, old)


STEPS_IN_FLIGHT = 3  # in the device's queue; more need more memory


@dataclasses.dataclass(frozen=True)
class LoopSettings:
  """Intervals of logging, evaluations and checkpoints, in steps; 0: at the end only.

  Below 1: a fraction of the run, at least `min_interval` steps. The state is also saved before each
  evaluation.
  """

  num_steps: int
  log_every: int = 50
  eval_every: int | float = 0
  checkpoint_every: int | float = 0
  best: str | None = None  # selects the best checkpoint: "<evaluation>/<score>"
  eval_best_at_end: bool = False  # also evaluate the best variables
  profile: tuple[int, int] | None = None  # half-open window of steps to trace
  min_interval: int = 1

  def is_due(self, every: int | float, step: int) -> bool:
    """Returns whether an action with this interval is due after `step`."""
    if 0 < every < 1:
      every = max(self.min_interval, round(every * self.num_steps))
    return step == self.num_steps or (every > 0 and step % every == 0)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Result of a run."""

  state: TrainState  # the last one
  finished: bool  # False if a signal ended the run before its last step; the state is saved then
  scores: dict[str, float]  # of the last evaluation: "<evaluation>/<score>"
  workdir: epath.Path


@dataclasses.dataclass
class Loop:
  """A training run in progress."""

  program: Program
  evaluations: Mapping[str, Evaluation]
  settings: LoopSettings
  checkpointer: Checkpointer
  writer: MetricWriter
  progress: Progress
  counters: Callable[[], Mapping[str, float]] = dict  # returns further scalars to log

  def run(self, state: TrainState, batches: Iterator[Mapping[str, jax.Array]]) -> Outcome:
    """Trains from `state`, which is donated, to the last step; `batches` begin with the next one.

    Raises FloatingPointError if a loss or a parameter is not finite (no later state is saved), or
    EvaluationError (the evaluated state is saved).
    """
    settings, scores, start = self.settings, {}, int(state.step)
    log = _TrainingLog(self, start)
    due = start and settings.is_due(settings.eval_every, start)
    if due and not is_evaluated(self.checkpointer.workdir, self.evaluations, start):
      scores = self.evaluate(start, state.variables)
    workdir = self.checkpointer.workdir
    with preemption_guard() as stop_requested, self._profile(log) as at_step:
      for step in range(start + 1, settings.num_steps + 1):
        at_step(step)
        with self.progress.time_as("input_wait"), self._saved_on_error(step - 1, state, log):
          batch = next(batches)
        with self.progress.exclude("compile") if step == start + 1 else contextlib.nullcontext():
          state, metrics = self.program.train_step(state, batch)
        log.add(step, metrics)
        stop = stop_requested(step) and step < settings.num_steps
        evaluate = settings.is_due(settings.eval_every, step)
        save = evaluate or settings.is_due(settings.checkpoint_every, step)
        if save or settings.is_due(settings.log_every, step):
          log.write(step)
        elif stop:
          log.save_pending(step)
        if save or stop:
          self._save(step, state)
        if stop:
          return Outcome(state, False, scores, workdir)
        if evaluate:
          scores = self.evaluate(step, state.variables)
    if settings.eval_best_at_end:
      scores = scores | self._evaluate_best(state.variables, scores)
    self.checkpointer.save(int(state.step), state)  # again, if its checkpoint was removed
    return Outcome(state, True, scores, workdir)

  @contextlib.contextmanager
  def _saved_on_error(self, step: int, state: TrainState, log: "_TrainingLog") -> Iterator[None]:
    """Saves the state if data cannot be read; only in runs of a single process."""
    try:
      yield
    except Exception:
      if log.start < step and jax.process_count() == 1:
        log.save_pending(step)
        self._save(step, state)
      raise

  def _save(self, step: int, state: TrainState) -> None:
    if not bool(_all_finite(state.params)):
      raise _diverged(f"a parameter is not finite after step {step}", self.checkpointer)
    with self.progress.exclude("checkpoint"):
      try:
        self.writer.flush()
      finally:  # an error of the log is raised after the state is saved
        self.checkpointer.save(step, state)

  def evaluate(self, step: int, variables: Variables) -> dict[str, float]:
    """Runs every evaluation, saves the variables if they are the best, and writes the reports."""
    with self.progress.exclude("evaluate"):
      report = run_evaluations(self.evaluations, variables)
      if (best := self.settings.best) is not None:
        check_names("score for checkpoint.best", [best], report.scores)
        if self.checkpointer.save_best(step, variables, report.scores[best]):
          self.checkpointer.wait()  # scores in the log mark the evaluation as complete
      self._write(step, report)
      logging.info("step %d: %s", step, format_scores(report.scores))
    return report.scores

  def _write(self, step: int, report: Report) -> None:
    self.writer.write_scalars(step, report.scores)
    self.writer.write_figures(step, report.figures, self.checkpointer.best_step)
    self.writer.flush()

  def _evaluate_best(self, last: Variables, last_scores: dict[str, float]) -> dict[str, float]:
    self.checkpointer.wait()
    try:
      best = find_checkpoint(self.checkpointer.workdir / BEST)
    except FileNotFoundError:
      return {}
    step = self.settings.num_steps
    if int(best.name) == step:
      logging.info("the last step is the best")
      return {f"best/{name}": value for name, value in last_scores.items()}
    with self.progress.exclude("evaluate"):
      report = run_evaluations(self.evaluations, restore_variables(best, last))
    scores = {f"best/{name}": value for name, value in report.scores.items()}
    self._write(step, Report(scores, {f"best_{k}": v for k, v in report.figures.items()}))
    logging.info("best checkpoint, step %s: %s", best.name, format_scores(report.scores))
    return scores

  @contextlib.contextmanager
  def _profile(self, training: "_TrainingLog") -> Iterator[Callable[[int], None]]:
    """Yields a function to call at the beginning of each step; the block's end ends the trace."""
    first, last = self.settings.profile or (0, 0)
    directory = str(self.checkpointer.workdir / "profile")
    with contextlib.ExitStack() as stack:

      def at_step(step: int) -> None:
        if step in (first, last):
          training.wait()  # so that the trace has exactly these steps
        if step == first:
          stack.enter_context(jax.profiler.trace(directory))
          logging.info("profiling steps %d to %d: %s", first, last - 1, directory)
        elif step == last:
          stack.close()

      yield at_step


def is_evaluated(workdir: epath.PathLike, evaluations: Iterable[str], step: int) -> bool:
  """Returns whether the log has scores of this step."""
  path, prefixes = epath.Path(workdir) / METRICS_FILE, tuple(f"{name}/" for name in evaluations)
  found = not prefixes
  if prefixes and is_primary() and path.exists():
    rows = [row for row in read_metrics(workdir) if row["step"] == step]
    found = any(key.startswith(prefixes) for row in rows for key in row)
  return all_gather_objects(found)[0]


class EvaluationError(ValueError):
  """An evaluation failed; the message begins with its name."""


def run_evaluations(evaluations: Mapping[str, Evaluation], variables: Variables) -> Report:
  """Runs evaluations; names scores "<evaluation>/<score>", and figures "<evaluation>_<name>"."""
  scores, figures = {}, {}
  for name, evaluation in evaluations.items():
    try:
      report = evaluation(variables)
    except Exception as error:
      raise EvaluationError(f"evaluation {name!r}: {error}") from error
    scores |= {f"{name}/{score}": value for score, value in report.scores.items()}
    figures |= {f"{name}_{key}": figure for key, figure in report.figures.items()}
  return Report(scores, figures)


def format_scores(scores: Mapping[str, float]) -> str:
  """Returns the scores in one line, without those of single classes ("val/accuracy/cat")."""
  shown = {k: v for k, v in scores.items() if k.removeprefix("best/").count("/") < 2}
  return "  ".join(f"{name} {value:.4g}" for name, value in shown.items())


_PER_CENT = re.compile(r"accuracy|_shot|^(box|mask)_a[pr]|iou|^layer_\d|^[psr]q")


def score_table(scores: Mapping[str, float]) -> list[str]:
  """Returns lines of a table: a row for each score, in per cent where it is a fraction.

  >>> score_table({"test/accuracy": 0.975, "test/loss": 0.125})
  ['              test', 'accuracy   97.50 %', 'loss         0.125']
  """
  rows: dict[str, dict[str, str]] = {}
  for name, value in scores.items():
    *evaluation, score = name.split("/")
    if len(evaluation) == 1 + (evaluation[0] == "best"):  # no single class
      shown = f"{100 * value:.2f} %" if _PER_CENT.search(score) else f"{value:.4g}"
      rows.setdefault(score, {})[" ".join(evaluation)] = shown
  columns = list(dict.fromkeys(column for row in rows.values() for column in row))
  width = max(map(len, rows), default=0)
  table = {"": {column: column for column in columns}, **rows} if rows else {}
  return [
    f"{score:{width}}" + "".join(f"{row.get(c, ''):>{max(10, 2 + len(c))}}" for c in columns)
    for score, row in table.items()
  ]


class _TrainingLog:
  """Collects each step's metrics on the device, and fetches them when a row is due."""

  def __init__(self, loop: Loop, start: int) -> None:
    self._loop, self.start = loop, start
    self._pending: dict[int, Metrics] = {}
    self._in_flight: collections.deque[Any] = collections.deque()
    self._file = loop.checkpointer.workdir / PENDING_FILE
    self._sums = read_pending(self._file, start) if start and is_primary() else {}

  def add(self, step: int, metrics: Metrics) -> None:
    """Adds the metrics of a step; waits for the step `STEPS_IN_FLIGHT` before it."""
    self._pending[step] = metrics
    self._in_flight.append(jax.tree.leaves(metrics)[0])
    if len(self._in_flight) > STEPS_IN_FLIGHT:
      self._in_flight.popleft().block_until_ready()

  def wait(self) -> None:
    if self._in_flight:
      self._in_flight[-1].block_until_ready()

  def write(self, step: int) -> None:
    """Writes the means over the steps since the last row; raises if a loss is not finite."""
    if not self._pending:
      return
    self._fetch()
    loop, sums = self._loop, self._sums
    means = {f"train/{name}": total / n for name, (total, n) in sums.items() if n > 0}
    self._sums = {}
    # The update with index t uses the schedule at t; the last index is step - 1.
    rates = {f"train/{k}": float(rate(step - 1)) for k, rate in loop.program.schedules.items()}
    speed = {f"speed/{name}": value for name, value in loop.progress.report(step).items()}
    with loop.progress.time_as("logging"):
      loop.writer.write_scalars(step, {**means, **rates, **speed, **loop.counters()})
      shown = means | rates
      names = sorted(shown, key=lambda name: "loss" not in name)  # losses first
      loop.progress.log(step, {name.removeprefix("train/"): shown[name] for name in names})

  def save_pending(self, step: int) -> None:
    """Saves the sums since the last row, for the first row of the resumed run."""
    self._fetch()
    if is_primary():
      with contextlib.suppress(OSError):  # a full disk: the save, which follows, reports it
        disk.write_json(self._file, {"step": step, "sums": self._sums})

  def _fetch(self) -> None:
    pending, self._pending = jax.device_get(self._pending), {}
    for step, metrics in pending.items():
      for name in sorted(metrics, key=lambda name: "loss" not in name):
        total, count = float(metrics[name].total), float(metrics[name].count)
        if ("loss" in name or "gradient_norm" in name) and not math.isfinite(total):
          raise _diverged(f"{name} is {total} at step {step}", self._loop.checkpointer)
        before = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (before[0] + total, before[1] + count)


def read_pending(file: epath.Path, step: int) -> dict[str, tuple[float, float]]:
  """Returns total and count of each metric, saved at `step`; empty, with a warning, if damaged."""
  try:
    kept = json.loads(file.read_text())
    if kept["step"] == step:
      return {name: (float(total), float(count)) for name, (total, count) in kept["sums"].items()}
  except FileNotFoundError:
    pass
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    logging.warning("%s is damaged; the next training metrics cover fewer steps", file)
  return {}


def _diverged(what: str, checkpointer: Checkpointer) -> FloatingPointError:
  saved = checkpointer.latest_step
  last = "no checkpoint yet" if saved is None else f"the last checkpoint is of step {saved}"
  return FloatingPointError(
    f"{what}; {last}. Check learning_rate, warmup_steps, clip_norm, bfloat16 and the labels; "
    "--overfit_one_batch separates errors of the data from errors of the model"
  )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def prefetch(batches: Iterator[Any], put: Callable[[Any], Any], depth: int = 2) -> Iterator[Any]:
  """Transfers up to `depth` batches to the devices ahead of their use."""
  queue: collections.deque[Any] = collections.deque()
  for batch in batches:
    queue.append(put(batch))
    if len(queue) >= depth:
      yield queue.popleft()
  yield from queue
