"""Evaluation: predictions on the mesh, scores on the hosts, every example counted once."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sized
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from matplotlib.figure import Figure

from vit_jax_zoo.tasks.base import Task, Variables
from vit_jax_zoo.train import sharding
from vit_jax_zoo.train.distributed import all_gather_objects, is_primary
from vit_jax_zoo.train.step import PredictStep

T = TypeVar("T")


@dataclasses.dataclass
class Report:
  """What an evaluation found: scores by name, and figures by name."""

  scores: dict[str, float]
  figures: dict[str, Figure] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Evaluation(Protocol):
  """Anything that judges variables. The loop calls it and logs its report under its name."""

  def __call__(self, variables: Variables) -> Report:
    """Judges `variables`. Called on all processes at once."""
    ...


@runtime_checkable
class SizedBatches(Sized, Iterable[dict[str, np.ndarray]], Protocol):
  """A finite sequence of batches; as many on every process."""


@dataclasses.dataclass(frozen=True)
class PredictionScores:
  """The usual evaluation: predict every batch of a split, and let the task's evaluator score it.

  Attributes:
    task: gives the evaluator and draws the figures.
    predict_step: compiled, see `compile_predict_step`.
    batches: makes the split's batches anew: this process's part of each.
    mesh: where to predict.
    name: of the split, for progress lines.
  """

  task: Task
  predict_step: PredictStep
  batches: Callable[[], SizedBatches]
  mesh: Mesh
  name: str

  def __call__(self, variables: Variables) -> Report:
    """Returns the scores over the whole split, figures of these, and figures of its first batch.

    Where images could not be read, and the data's policy is to go on, "skipped_images" counts them.
    """
    evaluator, figures = self.task.evaluator(), {}
    batches = self.batches()
    clock = _Clock(self.name, len(batches))
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
    return Report({**first.result(), **lost}, figures)


def gather_parts(value: T, mesh: Mesh) -> list[T]:
  """Returns what was made of each part of the data, on every process: one value for each part.

  Processes whose devices differ along `model` alone are fed the same part, and made the same of it.
  """
  part, _ = sharding.input_shard(mesh, sharding.batch_ways(mesh))
  found: dict[int, T] = {}
  for index, other in all_gather_objects((part, value)):
    found.setdefault(index, other)
  return [found[index] for index in sorted(found)]


def predict_batches(
  predict_step: PredictStep, variables: Variables, batches: Iterable[Any], mesh: Mesh
) -> Iterable[tuple[Any, Any]]:
  """Yields batches with their predictions, one batch behind: the device never waits for us."""
  ahead = None
  for batch in batches:
    predictions = predict_step(variables, sharding.to_global(batch, mesh))
    if ahead is not None:
      yield ahead[0], sharding.to_local(ahead[1])
    ahead = batch, predictions
  if ahead is not None:
    yield ahead[0], sharding.to_local(ahead[1])


class _Clock:
  """Says every ten seconds how far an evaluation has come."""

  def __init__(self, name: str, total: int) -> None:
    self._name, self._total = name, total
    self._start = self._said = time.monotonic()

  def tick(self, done: int) -> None:
    now = time.monotonic()
    if now - self._said < 10:
      return
    self._said = now
    left = (now - self._start) / done * (self._total - done)
    logging.info("evaluating %s: %d/%d batches, ETA %.0f s", self._name, done, self._total, left)


def compile_predict_step(predict_step: PredictStep, shardings: Any, mesh: Mesh) -> PredictStep:
  """Compiles a predict step: variables as laid out, batches and predictions split by example."""
  split = sharding.batch_sharding(mesh)
  return jax.jit(predict_step, in_shardings=(shardings, split), out_shardings=split)
