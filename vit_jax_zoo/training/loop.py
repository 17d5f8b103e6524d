"""The training loop. It knows no model and no task: a step, batches, and what to do between steps.

Each step goes in one order that never changes:

    next batch, train, log, evaluate, checkpoint

so that what is written under step N belongs to the state after N steps. The position in the data
is a function of the step: a run that is killed anywhere and started again repeats the lost steps,
and ends with the same bits.
"""

import collections
import contextlib
import dataclasses
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
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
from vit_jax_zoo.training.checkpoint import BEST, Checkpointer, find_checkpoint, restore_variables
from vit_jax_zoo.training.evaluate import Evaluation, Report
from vit_jax_zoo.training.metric_writer import MetricWriter
from vit_jax_zoo.training.progress import Progress
from vit_jax_zoo.training.train_step import Metrics, TrainState, TrainStep


class PreemptionGuard:
  """While it is entered, a request to stop is remembered in place of ending the process.

  In a process of its own, SIGTERM and the first SIGINT (Ctrl-C) count; a second SIGINT interrupts
  as ever. With `jax.distributed` initialised, JAX itself watches for SIGTERM on every host and lets
  all of them agree on a step, some steps after the signal, at which each is told; Ctrl-C interrupts
  at once.

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
    if _agrees_through_jax():
      return self
    if threading.current_thread() is not threading.main_thread():
      logging.warning("signals reach the main thread alone: SIGTERM will end this run unsaved")
      return self
    for number in (signal.SIGTERM, signal.SIGINT):
      self._old_handlers[number] = signal.signal(number, self._on_signal)
    return self

  def __exit__(self, *_: object) -> None:
    for number in list(self._old_handlers):
      self._restore(number)

  def requested(self, step: int) -> bool:
    """Says whether to save and leave after `step`.

    Args:
      step: every process must ask for every step, in order; all of them get the same answer.
    """
    if self._flag.is_set():
      return True
    if _agrees_through_jax() and multihost_utils.reached_preemption_sync_point(step):
      self._flag.set()
    return self._flag.is_set()

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    del frame
    self._flag.set()
    if number == signal.SIGINT:  # the next Ctrl-C shall not wait for anything
      self._restore(signal.SIGINT)

  def _restore(self, number: signal.Signals) -> None:
    old = self._old_handlers.pop(number, None)
    signal.signal(number, signal.SIG_DFL if old is None else old)


def _agrees_through_jax() -> bool:
  return jax.distributed.is_initialized() and getattr(
    jax.config, "jax_enable_preemption_service", False
  )


STEPS_IN_FLIGHT = 3
"""How many steps may wait on the device's queue: enough to keep it busy, few enough that batches do
not pile up in its memory."""


@dataclasses.dataclass(frozen=True)
class LoopSettings:
  """When what happens, in steps.

  Attributes:
    num_steps: length of the run.
    log_every: how often training metrics are fetched and written.
    eval_every: how often the evaluations run; 0: at the end alone. They always run at the end. A
      float below 1 is a share of all steps.
    checkpoint_every: how often the state is saved; 0: at the end alone; or a share.
    best: the score that chooses the best checkpoint, "<evaluation>/<score>"; higher is better.
    score_best: at the end, the best variables are scored as well.
    profile: the half-open window of steps of which `jax.profiler` takes a trace, or None.
  """

  num_steps: int
  log_every: int = 50
  eval_every: int | float = 0
  checkpoint_every: int | float = 0
  best: str | None = None
  score_best: bool = False
  profile: tuple[int, int] | None = None

  def check_profile(self, start_step: int) -> None:
    """Raises ValueError if a run from `start_step` on never comes to the steps to be traced."""
    if self.profile is not None and not start_step < self.profile[0] <= self.num_steps:
      raise ValueError(
        f"--profile={self.profile[0]}:{self.profile[1]} lies outside what this run trains: "
        f"steps {start_step + 1} to {self.num_steps}"
      )

  def is_due(self, every: int | float, step: int) -> bool:
    """Returns whether something that happens every so often happens after this step."""
    if 0 < every < 1:
      every = max(1, round(every * self.num_steps))
    return step == self.num_steps or (every > 0 and step % every == 0)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended.

  Attributes:
    state: the last one.
    finished: False when a signal ended the run before its last step; the state is saved then.
    scores: of the last evaluation, "<evaluation>/<score>".
    workdir: where everything lies.
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
    evaluations: by name; what runs every `eval_every` steps.
    schedules: learning rates to log, as functions of the step, by metric name.
    settings: when what happens.
    checkpointer: saves the state.
    writer: takes scalars and figures.
    progress: keeps time.
    workdir: of the run.
    counters: returns more scalars to log, by name, such as what the input has counted.
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
    """Trains from where `state` is to the last step.

    Args:
      state: fresh or restored. It is donated: do not use it afterwards.
      batches: global arrays; the first one is that of the state's next step.

    Raises:
      FloatingPointError: a loss was not finite. No later state has been saved.
    """
    settings, scores = self.settings, {}
    training = _TrainingLog(self)
    first = int(state.step) + 1
    with PreemptionGuard() as guard, self._profile(training) as at_step:
      for step in range(first, settings.num_steps + 1):
        at_step(step)
        with self.progress.inside("input_wait"):
          batch = next(batches)
        with self.progress.outside("compile") if step == first else contextlib.nullcontext():
          state, metrics = self.train_step(state, batch)
        training.add(step, metrics)
        stop = guard.requested(step) and step < settings.num_steps
        evaluate = settings.is_due(settings.eval_every, step) and not stop
        save = settings.is_due(settings.checkpoint_every, step) or stop
        if settings.is_due(settings.log_every, step) or evaluate or save:
          training.write(step)
        if evaluate or save:
          self._check_state(step, state)
        if evaluate:
          scores = self.evaluate(step, state.variables)
        if save:
          with self.progress.outside("checkpoint"):
            self.writer.flush()
            self.checkpointer.save(step, state)
        if stop:
          return self._outcome(state, scores, finished=False)
    if settings.score_best:
      scores = scores | self._score_best(state.variables, scores)
    return self._outcome(state, scores, finished=True)

  def _outcome(self, state: TrainState, scores: dict[str, float], *, finished: bool) -> Outcome:
    return Outcome(state, finished, scores, epath.Path(self.workdir))

  def evaluate(self, step: int, variables: Variables) -> dict[str, float]:
    """Runs every evaluation, writes what they report, and keeps the best variables."""
    with self.progress.outside("evaluate"):
      report = run_evaluations(self.evaluations, variables)
      self.writer.write_scalars(step, report.scores)
      self.writer.write_figures(step, report.figures)
      logging.info("step %d: %s", step, in_words(report.scores))
      best = self.settings.best
      if best is not None and best not in report.scores:
        raise ValueError(unknown_name("score for checkpoint.best", best, report.scores))
      if best is not None:
        self.checkpointer.save_best(step, variables, report.scores[best])
      self.writer.flush()
    return report.scores

  def _score_best(self, last: Variables, last_scores: dict[str, float]) -> dict[str, float]:
    """Scores the best variables on every evaluation; returns "best/<evaluation>/<score>".

    The evaluation that chose them favours them: another says how good they are.
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
    with self.progress.outside("evaluate"):
      report = run_evaluations(self.evaluations, restore_variables(best, like))
    scores = {f"best/{name}": value for name, value in report.scores.items()}
    self.writer.write_scalars(step, scores)
    self.writer.write_figures(step, {f"best_{k}": v for k, v in report.figures.items()})
    self.writer.flush()
    logging.info("the best, of step %s: %s", best.name, in_words(report.scores))
    return scores

  def _check_state(self, step: int, state: TrainState) -> None:
    """Raises if a parameter is not finite: no such state is scored or saved."""
    if not bool(_all_finite(state.params)):
      raise _diverged(f"a parameter is not finite after step {step}", self.checkpointer)

  @contextlib.contextmanager
  def _profile(self, training: "_TrainingLog") -> Iterator[Callable[[int], None]]:
    """Yields what is to be told of every step that begins; a trace ends with the block at last."""
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


def run_evaluations(evaluations: Mapping[str, Evaluation], variables: Variables) -> Report:
  """Runs them in order; scores are named "<evaluation>/<score>", figures "<evaluation>_<name>"."""
  whole = Report({}, {})
  for name, evaluation in evaluations.items():
    report = evaluation(variables)
    whole.scores.update({f"{name}/{score}": value for score, value in report.scores.items()})
    whole.figures.update({f"{name}_{key}": figure for key, figure in report.figures.items()})
  return whole


def in_words(scores: Mapping[str, float]) -> str:
  """Returns the scores in one line, without those of single classes ("val/accuracy/cat")."""
  said = {k: v for k, v in scores.items() if k.removeprefix("best/").count("/") < 2}
  return "  ".join(f"{name} {value:.4g}" for name, value in said.items())


class _TrainingLog:
  """Collects each step's metrics on the device, and fetches them when they are written."""

  def __init__(self, loop: Loop) -> None:
    self._loop = loop
    self._pending: dict[int, Metrics] = {}
    self._in_flight: collections.deque[Any] = collections.deque()

  def add(self, step: int, metrics: Metrics) -> None:
    """Takes the metrics of a step; waits for the step `STEPS_IN_FLIGHT` before it."""
    self._pending[step] = metrics
    self._in_flight.append(jax.tree.leaves(metrics)[0])
    if len(self._in_flight) > STEPS_IN_FLIGHT:
      self._in_flight.popleft().block_until_ready()

  def wait(self) -> None:
    """Waits for the newest step."""
    if self._in_flight:
      self._in_flight[-1].block_until_ready()

  def write(self, step: int) -> None:
    """Writes the means over the steps since the last time, and raises if a loss is not finite."""
    if not self._pending:
      return
    pending, self._pending = jax.device_get(self._pending), {}
    for at, metrics in pending.items():
      _check_finite(at, metrics, self._loop.checkpointer)
    loop = self._loop
    means = {f"train/{name}": mean for name, mean in _merged_means(pending.values()).items()}
    # The update numbered t from 0 uses the schedule at t, and the last one was number step - 1.
    rates = {f"train/{name}": float(rate(step - 1)) for name, rate in loop.schedules.items()}
    speed = {f"speed/{name}": value for name, value in loop.progress.report(step).items()}
    with loop.progress.inside("logging"):
      loop.writer.write_scalars(step, {**means, **rates, **speed, **loop.counters()})
      loop.progress.log(step, _for_the_line(means | rates))


def _for_the_line(scalars: Mapping[str, float]) -> dict[str, float]:
  names = sorted(scalars, key=_losses_first)
  return {name.removeprefix("train/"): scalars[name] for name in names}


def _losses_first(name: str) -> bool:
  """Sorts names: losses are what one looks for."""
  return "loss" not in name


def _merged_means(history: Any) -> dict[str, float]:
  """Merges each metric over the steps; one that counted nothing is left out."""
  totals: dict[str, float] = collections.defaultdict(float)
  counts: dict[str, float] = collections.defaultdict(float)
  for metrics in history:
    for name, mean in metrics.items():
      totals[name] += float(mean.total)
      counts[name] += float(mean.count)
  return {name: totals[name] / count for name, count in counts.items() if count > 0}


def _check_finite(step: int, metrics: Metrics, checkpointer: Checkpointer) -> None:
  for name in sorted(metrics, key=_losses_first):
    value = float(np.asarray(metrics[name].total))
    if ("loss" in name or "gradient_norm" in name) and not math.isfinite(value):
      raise _diverged(f"{name} is {value} at step {step}", checkpointer)


def _diverged(what: str, checkpointer: Checkpointer) -> FloatingPointError:
  saved = checkpointer.latest_step
  last = "there is no checkpoint yet" if saved is None else f"the last good one is step {saved}"
  return FloatingPointError(
    f"{what}; {last}. Look at learning_rate, warmup_steps, clip_norm, bfloat16 and the labels; "
    "--overfit_one_batch tells data from model"
  )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def prefetch(batches: Iterator[Any], put: Callable[[Any], Any], depth: int = 2) -> Iterator[Any]:
  """Keeps `depth` batches on their way to the devices while the one before is worked on."""
  queue: collections.deque[Any] = collections.deque()
  for batch in batches:
    queue.append(put(batch))
    if len(queue) >= depth:
      yield queue.popleft()
  yield from queue
