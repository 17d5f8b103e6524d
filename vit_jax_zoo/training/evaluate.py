"""Evaluation: predictions on the mesh, scores on the hosts, every example counted once."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sized
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
    return Report({**first.result(), **lost}, figures)


@dataclasses.dataclass(frozen=True)
class Explanations:
  """The evaluation that scores nothing: it draws what the model shows of its inside.

  Attributes:
    task: draws the figures.
    explain_step: compiled `task.explain`, whose results are whole on every process.
    batches: makes a split's batches anew: this process's part of each. The first one is explained.
    mesh: where to compute.
  """

  task: Task
  explain_step: PredictStep
  batches: Callable[[], SizedBatches]
  mesh: Mesh

  def __call__(self, variables: Variables) -> Report:
    """Returns figures alone, and those on one process."""
    batch = _without_padding(next(iter(self.batches())))
    found = self.explain_step(variables, sharding.to_global(batch, self.mesh))
    if not is_primary():
      return Report({})
    explained = self.task.draw_explanation(jax.device_get(found))
    model = {f"model_{name}": figure for name, figure in explained.model.items()}
    return Report({}, {**explained.images, **model})


def _without_padding(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Puts real examples, over again, where a batch is padded."""
  real = np.flatnonzero(batch["mask"]) if "mask" in batch else ()
  if not len(real):
    return dict(batch)
  return {key: value[np.resize(real, len(value))] for key, value in batch.items()}


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


class Clock:
  """Says every ten seconds how far an evaluation has come."""

  def __init__(self, name: str, total: int) -> None:
    """Begins to count.

    Args:
      name: of the evaluation.
      total: how many batches it has.
    """
    self._name, self._total = name, total
    self._start = self._said = time.monotonic()

  def tick(self, done: int) -> None:
    """Takes note that so many batches are done."""
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
