"""Evaluations: predictions on the mesh, scores on the hosts, each example counted once."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from matplotlib.figure import Figure

from vit_jax_zoo.tasks.base import Task, Variables
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.distributed import all_gather_objects, is_primary
from vit_jax_zoo.training.train_step import PredictStep

T = TypeVar("T")


@dataclasses.dataclass
class Report:
  """Scores and figures of an evaluation, by name."""

  scores: dict[str, float]
  figures: dict[str, Figure] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Evaluation(Protocol):
  """Evaluates variables. The loop writes its report under its name."""

  def __call__(self, variables: Variables) -> Report:
    """Evaluates `variables`; called on all processes."""
    ...


@runtime_checkable
class SizedBatches(Sized, Iterable[dict[str, np.ndarray]], Protocol):
  """A finite sequence of batches, of the same length on every process."""


@dataclasses.dataclass(frozen=True)
class PredictionScores:
  """Scores the predictions for a split with the task's evaluator.

  Attributes:
    task: provides the evaluator and draws the figures.
    predict_step: compiled, see `compile_predict_step`.
    batches: returns this process's part of the split's batches.
    mesh: devices to predict on.
    name: of the split, for progress lines.
    metrics: the scores that are reported; default: all of the task's.
  """

  task: Task
  predict_step: PredictStep
  batches: Callable[[], SizedBatches]
  mesh: Mesh
  name: str
  metrics: Sequence[str] = ()

  def __call__(self, variables: Variables) -> Report:
    """Returns the scores over the whole split, and figures of them and of the first batch.

    "skipped_images" is the number of images that could not be read, if there are any.
    """
    evaluator, figures = self.task.evaluator(), {}
    batches = self.batches()
    clock = Clock(self.name, len(batches))
    pairs = predict_batches(self.predict_step, variables, batches, self.mesh)
    for index, (batch, predictions) in enumerate(pairs):
      evaluator.add(batch, predictions)
      if index == 0 and is_primary():
        figures = self.task.figures(batch, predictions)
      clock.tick(index + 1)
    skipped = getattr(batches, "num_skipped", 0)
    parts, losses = zip(*gather_parts((evaluator, skipped), self.mesh), strict=True)
    first, *others = parts
    for other in others:
      first.merge(other)
    if is_primary():
      figures = {**figures, **self.task.score_figures(first)}
    lost = {"skipped_images": float(sum(losses))} if any(losses) else {}
    scores = first.result()
    if self.metrics:
      scores = {k: v for k, v in scores.items() if k.partition("/")[0] in self.metrics}
    return Report({**scores, **lost}, figures)


@dataclasses.dataclass(frozen=True)
class Explanations:
  """Draws attention maps and other intermediates; no scores.

  Attributes:
    task: draws the figures.
    explain_step: compiled `task.explain`, with replicated results.
    batches: returns this process's part of a split's batches; the first one is used.
    mesh: devices to compute on.
  """

  task: Task
  explain_step: PredictStep
  batches: Callable[[], SizedBatches]
  mesh: Mesh

  def __call__(self, variables: Variables) -> Report:
    """Returns figures, on process 0 only."""
    batch = _without_padding(next(iter(self.batches())))
    found = self.explain_step(variables, sharding.to_global(batch, self.mesh))
    if not is_primary():
      return Report({})
    explained = self.task.draw_explanation(jax.device_get(found))
    model = {f"model_{name}": figure for name, figure in explained.model.items()}
    return Report({}, {**explained.images, **model})


def _without_padding(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Replaces padding by repeated real examples."""
  real = np.flatnonzero(batch["mask"]) if "mask" in batch else ()
  if not len(real):
    return dict(batch)
  return {key: value[np.resize(real, len(value))] for key, value in batch.items()}


def gather_parts(value: T, mesh: Mesh) -> list[T]:
  """Returns the value of each part of the data, on every process.

  Processes whose devices differ only along `model` have the same part.
  """
  part, _ = sharding.input_shard(mesh, sharding.batch_ways(mesh))
  found: dict[int, T] = {}
  for index, other in all_gather_objects((part, value)):
    found.setdefault(index, other)
  return [found[index] for index in sorted(found)]


def predict_batches(
  predict_step: PredictStep, variables: Variables, batches: Iterable[Any], mesh: Mesh
) -> Iterable[tuple[Any, Any]]:
  """Yields batches with their predictions, one batch behind, so that the device does not wait."""
  ahead = None
  for batch in batches:
    predictions = predict_step(variables, sharding.to_global(batch, mesh))
    if ahead is not None:
      yield ahead[0], sharding.to_local(ahead[1])
    ahead = batch, predictions
  if ahead is not None:
    yield ahead[0], sharding.to_local(ahead[1])


class Clock:
  """Logs the progress of an evaluation every ten seconds."""

  def __init__(self, name: str, total: int) -> None:
    """Starts the clock.

    Args:
      name: of the evaluation.
      total: its number of batches.
    """
    self._name, self._total = name, total
    self._start = self._logged = time.monotonic()

  def tick(self, done: int) -> None:
    """Sets the number of batches that are done."""
    now = time.monotonic()
    if now - self._logged < 10:
      return
    self._logged = now
    left = (now - self._start) / done * (self._total - done)
    logging.info("evaluating %s: %d/%d batches, ETA %.0f s", self._name, done, self._total, left)


def compile_predict_step(predict_step: PredictStep, shardings: Any, mesh: Mesh) -> PredictStep:
  """Compiles a predict step: variables with `shardings`, batches and predictions by example."""
  split = sharding.batch_sharding(mesh)
  return jax.jit(predict_step, in_shardings=(shardings, split), out_shardings=split)
