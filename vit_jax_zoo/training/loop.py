"""The training loop: train steps, logging, checkpoints, evaluations, in this order in each step.

What is written under step N belongs to the state after N steps. The position in the data is a
function of the step: a run that is interrupted anywhere and started again repeats the lost steps,
and is bit-identical to an uninterrupted run at the end. A state is saved before it is evaluated, so
that no evaluation, figure or log can lose it; an evaluation that is missing in the log is repeated
when the run resumes.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from vit_jax_zoo.errors import unknown_name
from vit_jax_zoo.tasks.base import Variables
from vit_jax_zoo.training import atomic_write
from vit_jax_zoo.training.checkpoint import BEST, Checkpointer, find_checkpoint, restore_variables
from vit_jax_zoo.training.distributed import all_gather_objects, is_primary
from vit_jax_zoo.training.evaluate import Evaluation, Report
from vit_jax_zoo.training.metric_writer import METRICS_FILE, MetricWriter, read_metrics
from vit_jax_zoo.training.progress import Progress
from vit_jax_zoo.training.train_step import Metrics, TrainState, TrainStep

PENDING_FILE = "pending_metrics.json"
"""Sums of the training metrics that a SIGTERM interrupted between two rows of the log."""


class PreemptionGuard:
  """SIGTERM and SIGINT set a flag that the loop polls each step.

  In a single process, SIGTERM and the first SIGINT (Ctrl-C) set it; a second SIGINT interrupts.
  With `jax.distributed` initialised, JAX handles SIGTERM on every host, and the hosts agree on a
  step, some steps after the signal; Ctrl-C interrupts at once.

      with PreemptionGuard() as guard:
        for step in ...:
          ...
          if guard.requested(step):
            save and leave
  """

  def __init__(self) -> None:
    self._flag = threading.Event()
    self._old_handlers: dict[signal.Signals, Any] = {}

  def __enter__(self) -> "PreemptionGuard":
    self._flag.clear()
    if _jax_handles_preemption():
      return self
    if threading.current_thread() is not threading.main_thread():
      logging.warning("not in the main thread: SIGTERM will end this run without a checkpoint")
      return self
    for number in (signal.SIGTERM, signal.SIGINT):
      self._old_handlers[number] = signal.signal(number, self._on_signal)
    return self

  def __exit__(self, *_: object) -> None:
    for number in list(self._old_handlers):
      self._restore(number)

  def requested(self, step: int) -> bool:
    """Returns whether to save and stop after `step`; the same on all processes.

    Args:
      step: training steps completed; every process must pass every step, in order.
    """
    if self._flag.is_set():
      return True
    if _jax_handles_preemption() and multihost_utils.reached_preemption_sync_point(step):
      self._flag.set()
    return self._flag.is_set()

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    del frame
    self._flag.set()
    if number == signal.SIGINT:  # the next Ctrl-C interrupts at once
      self._restore(signal.SIGINT)

  def _restore(self, number: signal.Signals) -> None:
    old = self._old_handlers.pop(number, None)
    signal.signal(number, signal.SIG_DFL if old is None else old)


def _jax_handles_preemption() -> bool:
  return jax.distributed.is_initialized() and getattr(
    jax.config, "jax_enable_preemption_service", False
  )


STEPS_IN_FLIGHT = 3
"""Steps in the device's queue: enough to keep it busy, few enough to limit the batches in its
memory."""


@dataclasses.dataclass(frozen=True)
class LoopSettings:
  """Schedule of logging, evaluations and checkpoints, in steps.

  Attributes:
    num_steps: length of the run.
    log_every: interval at which training metrics are fetched and written.
    eval_every: interval of the evaluations; 0: at the end only. They always run at the end. A float
      below 1 is a fraction of all steps.
    checkpoint_every: interval of checkpoints; 0: at the end only; or a fraction. The state is also
      saved before each evaluation.
    best: the score that selects the best checkpoint, "<evaluation>/<score>".
    eval_best_at_end: also evaluate the best variables at the end.
    profile: half-open window of steps of which `jax.profiler` takes a trace, or None.
  """

  num_steps: int
  log_every: int = 50
  eval_every: int | float = 0
  checkpoint_every: int | float = 0
  best: str | None = None
  eval_best_at_end: bool = False
  profile: tuple[int, int] | None = None

  def check_profile(self, start_step: int) -> None:
    """Raises ValueError if a run from `start_step` on does not include the window to trace."""
    if self.profile is not None and not start_step < self.profile[0] <= self.num_steps:
      raise ValueError(
        f"--profile={self.profile[0]}:{self.profile[1]} lies outside the steps of this run, "
        f"{start_step + 1} to {self.num_steps}"
      )

  def is_due(self, every: int | float, step: int) -> bool:
    """Returns whether an action with this interval is due after `step`."""
    if 0 < every < 1:
      every = max(1, round(every * self.num_steps))
    return step == self.num_steps or (every > 0 and step % every == 0)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Result of a run.

  Attributes:
    state: the last one.
    finished: False if a signal ended the run before its last step; the state is saved then.
    scores: of the last evaluation, "<evaluation>/<score>".
    workdir: the run's directory.
  """

  state: TrainState
  finished: bool
  scores: dict[str, float]
  workdir: epath.Path


@dataclasses.dataclass
class Loop:
  """A training run in progress.

  Attributes:
    train_step: compiled; donates its state.
    evaluations: by name; they run every `eval_every` steps.
    schedules: learning rates to log, as functions of the step, by metric name.
    settings: see `LoopSettings`.
    checkpointer: saves the state.
    writer: writes scalars and figures.
    progress: measures time.
    workdir: of the run.
    counters: returns further scalars to log, by name.
  """

  train_step: TrainStep
  evaluations: Mapping[str, Evaluation]
  schedules: Mapping[str, Callable[[int], Any]]
  settings: LoopSettings
  checkpointer: Checkpointer
  writer: MetricWriter
  progress: Progress
  workdir: epath.PathLike
  counters: Callable[[], Mapping[str, float]] = dict

  def run(self, state: TrainState, batches: Iterator[Mapping[str, jax.Array]]) -> Outcome:
    """Trains from `state` to the last step.

    Args:
      state: fresh or restored. It is donated: do not use it afterwards.
      batches: global arrays; the first one is that of the state's next step.

    Raises:
      FloatingPointError: a loss or a parameter was not finite. No later state has been saved.
      EvaluationError: an evaluation failed; the state that it evaluated is saved.
    """
    settings, scores, start = self.settings, {}, int(state.step)
    log = _TrainingLog(self, start)
    if (
      start
      and settings.is_due(settings.eval_every, start)
      and not is_evaluated(self.workdir, self.evaluations, start)
    ):
      scores = self.evaluate(start, state.variables)
    with PreemptionGuard() as guard, self._profile(log) as at_step:
      for step in range(start + 1, settings.num_steps + 1):
        at_step(step)
        with self.progress.time_as("input_wait"):
          batch = next(batches)
        compiles = step == start + 1
        with self.progress.exclude("compile") if compiles else contextlib.nullcontext():
          state, metrics = self.train_step(state, batch)
        log.add(step, metrics)
        stop = guard.requested(step) and step < settings.num_steps
        evaluate = settings.is_due(settings.eval_every, step)
        save = evaluate or settings.is_due(settings.checkpoint_every, step)
        if save or settings.is_due(settings.log_every, step):
          log.write(step)
        elif stop:
          log.keep(step)
        if save or stop:
          self._save(step, state)
        if stop:
          return self._outcome(state, scores, finished=False)
        if evaluate:
          scores = self.evaluate(step, state.variables)
    if settings.eval_best_at_end:
      scores = scores | self._evaluate_best(state.variables, scores)
    return self._outcome(state, scores, finished=True)

  def _outcome(self, state: TrainState, scores: dict[str, float], *, finished: bool) -> Outcome:
    return Outcome(state, finished, scores, epath.Path(self.workdir))

  def _save(self, step: int, state: TrainState) -> None:
    """Saves the state after the log, which must be complete up to a checkpoint.

    A log that cannot be written ends the run, but after the state is saved.
    """
    if not bool(_all_finite(state.params)):
      raise _diverged(f"a parameter is not finite after step {step}", self.checkpointer)
    with self.progress.exclude("checkpoint"):
      try:
        self.writer.flush()
      finally:
        self.checkpointer.save(step, state)

  def evaluate(self, step: int, variables: Variables) -> dict[str, float]:
    """Runs every evaluation, saves the variables if they are the best, and writes the reports."""
    with self.progress.exclude("evaluate"):
      report = run_evaluations(self.evaluations, variables)
      best = self.settings.best
      if best is not None and best not in report.scores:
        raise ValueError(unknown_name("score for checkpoint.best", best, report.scores))
      if best is not None and self.checkpointer.save_best(step, variables, report.scores[best]):
        self.checkpointer.wait()  # scores in the log mark the evaluation as complete
      self.writer.write_scalars(step, report.scores)
      self.writer.write_figures(step, report.figures)
      logging.info("step %d: %s", step, format_scores(report.scores))
      self.writer.flush()
    return report.scores

  def _evaluate_best(self, last: Variables, last_scores: dict[str, float]) -> dict[str, float]:
    """Runs every evaluation on the best variables; returns "best/<evaluation>/<score>".

    The evaluation that selected them is biased in their favour; the others are not.
    """
    self.checkpointer.wait()
    try:
      best = find_checkpoint(self.checkpointer.workdir / BEST)
    except FileNotFoundError:
      return {}
    step = self.settings.num_steps
    if int(best.name) == step:
      logging.info("the last step is the best")
      return {f"best/{name}": value for name, value in last_scores.items()}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), last)
    with self.progress.exclude("evaluate"):
      report = run_evaluations(self.evaluations, restore_variables(best, like))
    scores = {f"best/{name}": value for name, value in report.scores.items()}
    self.writer.write_scalars(step, scores)
    self.writer.write_figures(step, {f"best_{k}": v for k, v in report.figures.items()})
    self.writer.flush()
    logging.info("best checkpoint, step %s: %s", best.name, format_scores(report.scores))
    return scores

  @contextlib.contextmanager
  def _profile(self, training: "_TrainingLog") -> Iterator[Callable[[int], None]]:
    """Yields a function to call at the begin of each step; a trace ends with the block at last."""
    first, last = self.settings.profile or (0, 0)
    directory = os.path.join(self.workdir, "profile")
    with contextlib.ExitStack() as stack:

      def at_step(step: int) -> None:
        if step in (first, last):
          training.wait()  # so that the trace holds these steps, all of them and no others
        if step == first:
          stack.enter_context(jax.profiler.trace(directory))
          logging.info("taking a profile of steps %d to %d in %s", first, last - 1, directory)
        elif step == last:
          stack.close()

      yield at_step


def is_evaluated(workdir: epath.PathLike, evaluations: Iterable[str], step: int) -> bool:
  """Returns whether the log has scores of this step; if not, the run was interrupted before.

  Args:
    workdir: of the run.
    evaluations: their names.
    step: training steps completed.
  """
  path, prefixes = epath.Path(workdir) / METRICS_FILE, tuple(f"{name}/" for name in evaluations)
  found = not prefixes
  if prefixes and is_primary() and path.exists():
    rows = [row for row in read_metrics(workdir) if row["step"] == step]
    found = any(key.startswith(prefixes) for row in rows for key in row)
  return all_gather_objects(found)[0]


class EvaluationError(ValueError):
  """An evaluation failed. The message names it."""


def run_evaluations(evaluations: Mapping[str, Evaluation], variables: Variables) -> Report:
  """Runs them in order; scores are named "<evaluation>/<score>", figures "<evaluation>_<name>".

  Raises:
    EvaluationError: one of them raised an error.
  """
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


class _TrainingLog:
  """Collects each step's metrics on the device, and fetches them when a row is due."""

  def __init__(self, loop: Loop, start: int) -> None:
    self._loop = loop
    self._pending: dict[int, Metrics] = {}
    self._in_flight: collections.deque[Any] = collections.deque()
    self._sums = _Sums()
    path = epath.Path(loop.workdir) / PENDING_FILE
    if start and is_primary() and path.exists():
      kept = json.loads(path.read_text())
      if kept["step"] == start:
        self._sums = _Sums(kept["totals"], kept["counts"])

  def add(self, step: int, metrics: Metrics) -> None:
    """Adds the metrics of a step; waits for the step `STEPS_IN_FLIGHT` before it."""
    self._pending[step] = metrics
    self._in_flight.append(jax.tree.leaves(metrics)[0])
    if len(self._in_flight) > STEPS_IN_FLIGHT:
      self._in_flight.popleft().block_until_ready()

  def wait(self) -> None:
    """Waits for the newest step."""
    if self._in_flight:
      self._in_flight[-1].block_until_ready()

  def write(self, step: int) -> None:
    """Writes the means over the steps since the last row; raises if a loss is not finite."""
    if not self._pending:
      return
    loop, means = self._loop, {f"train/{name}": mean for name, mean in self._fetch().means()}
    self._sums = _Sums()
    # The update numbered t from 0 uses the schedule at t, and the last one was number step - 1.
    rates = {f"train/{name}": float(rate(step - 1)) for name, rate in loop.schedules.items()}
    speed = {f"speed/{name}": value for name, value in loop.progress.report(step).items()}
    with loop.progress.time_as("logging"):
      loop.writer.write_scalars(step, {**means, **rates, **speed, **loop.counters()})
      loop.progress.log(step, _for_the_line(means | rates))

  def keep(self, step: int) -> None:
    """Saves the sums since the last row, so that the row after a resume covers these steps too."""
    sums = self._fetch()
    if is_primary():
      content = {"step": step, "totals": sums.totals, "counts": sums.counts}
      atomic_write.write_json(epath.Path(self._loop.workdir) / PENDING_FILE, content)

  def _fetch(self) -> "_Sums":
    pending, self._pending = jax.device_get(self._pending), {}
    for step, metrics in pending.items():
      _check_finite(step, metrics, self._loop.checkpointer)
      self._sums.add(metrics)
    return self._sums


class _Sums:
  """Totals and counts of metrics over steps, by name."""

  def __init__(
    self, totals: Mapping[str, float] | None = None, counts: Mapping[str, float] | None = None
  ) -> None:
    self.totals: dict[str, float] = dict(totals or {})
    self.counts: dict[str, float] = dict(counts or {})

  def add(self, metrics: Metrics) -> None:
    for name, mean in metrics.items():
      self.totals[name] = self.totals.get(name, 0.0) + float(mean.total)
      self.counts[name] = self.counts.get(name, 0.0) + float(mean.count)

  def means(self) -> Iterator[tuple[str, float]]:
    """Yields the mean of each metric; none of those that counted nothing."""
    return ((k, self.totals[k] / count) for k, count in self.counts.items() if count > 0)


def _for_the_line(scalars: Mapping[str, float]) -> dict[str, float]:
  names = sorted(scalars, key=_losses_first)
  return {name.removeprefix("train/"): scalars[name] for name in names}


def _losses_first(name: str) -> bool:
  """Sort key of metric names."""
  return "loss" not in name


def _check_finite(step: int, metrics: Metrics, checkpointer: Checkpointer) -> None:
  for name in sorted(metrics, key=_losses_first):
    value = float(np.asarray(metrics[name].total))
    if ("loss" in name or "gradient_norm" in name) and not math.isfinite(value):
      raise _diverged(f"{name} is {value} at step {step}", checkpointer)


def _diverged(what: str, checkpointer: Checkpointer) -> FloatingPointError:
  saved = checkpointer.latest_step
  last = "there is no checkpoint yet" if saved is None else f"the last good one is step {saved}"
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
