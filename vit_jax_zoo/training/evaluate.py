"""Evaluations: predictions on the mesh, scores on the hosts, each example counted once."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from matplotlib.figure import Figure

from vit_jax_zoo.metrics.base import real_rows
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


Evaluation: TypeAlias = Callable[[Variables], Report]  # called on all processes


@runtime_checkable
class SizedBatches(Sized, Iterable[dict[str, np.ndarray]], Protocol):
  """A finite sequence of batches, of the same length on every process."""


def score_predictions(
  variables: Variables,
  *,
  task: Task,
  predict_step: PredictStep,
  batches: Callable[[], SizedBatches],
  mesh: Mesh,
  name: str,
  metrics: Sequence[str] = (),
) -> Report:
  """Returns a split's scores (of `metrics`, or all), "skipped_images" if any, and figures."""
  evaluator, figures, data = task.evaluator(), dict[str, Figure](), batches()
  pairs = predict_batches(predict_step, variables, data, mesh, name, len(data))
  for index, (batch, predictions) in enumerate(pairs):
    evaluator.add(batch, predictions)
    if index == 0 and is_primary() and np.any(batch.get("mask", True)):
      figures = draw(name, task.figures, batch, predictions)
  skipped = getattr(data, "num_skipped", 0)
  (first, *others), counts = zip(*gather_parts((evaluator, skipped), mesh), strict=True)
  for other in others:
    first.merge(other)
  if is_primary():
    figures |= draw(name, task.score_figures, first)
  scores = first.result()
  if metrics:
    scores = {k: v for k, v in scores.items() if k.partition("/")[0] in metrics}
  if any(counts):
    scores["skipped_images"] = float(sum(counts))
  return Report(scores, figures)


def draw(name: str, figures: Callable[..., dict[str, Figure]], *args: Any) -> dict[str, Figure]:
  """Returns `figures(*args)` of an evaluation; none, with a warning, if they cannot be drawn."""
  try:
    return figures(*args)
  except Exception as error:  # scores and training are worth more than any figure
    logging.warning("evaluation %r: no figures: %s: %s", name, type(error).__name__, error)
    return {}


def explain(
  variables: Variables,
  *,
  task: Task,
  explain_step: PredictStep,
  load_batch: Callable[[], dict[str, np.ndarray]],
  mesh: Mesh,
) -> Report:
  """Returns figures of a batch's attention maps and other intermediates, on process 0."""
  batch = load_batch()
  real = real_rows(batch, len(next(iter(batch.values()))))
  if len(real):  # padding is replaced by repeated examples
    batch = {key: value[np.resize(real, len(value))] for key, value in batch.items()}
  try:
    explanation = explain_step(variables, sharding.to_global(batch, mesh))
    if not is_primary():
      return Report({})
    images, model = task.draw_explanation(jax.device_get(explanation))
    return Report({}, {**images, **{f"model_{name}": figure for name, figure in model.items()}})
  except Exception as error:  # a model without them, or as in `draw`
    logging.warning("explain: %s; set explain=False", error)
    return Report({})


def gather_parts(value: T, mesh: Mesh) -> list[T]:
  """Returns the value of each part of the data, on every process; see `sharding.input_shard`."""
  part, _ = sharding.input_shard(mesh, sharding.batch_ways(mesh))
  values = dict(reversed(all_gather_objects((part, value))))
  return [values[index] for index in sorted(values)]


def predict_batches(
  predict_step: PredictStep,
  variables: Variables,
  batches: Iterable[Any],
  mesh: Mesh,
  name: str,
  total: int,
) -> Iterator[tuple[Any, Any]]:
  """Yields batches with their predictions, one batch behind, so that the device does not wait."""
  begin = logged = time.monotonic()
  ahead = None
  for done, batch in enumerate(itertools.chain(batches, [None])):
    latest = None
    if batch is not None:
      latest = batch, predict_step(variables, sharding.to_global(batch, mesh))
    if ahead is not None:
      yield ahead[0], sharding.to_local(ahead[1])
    ahead, now = latest, time.monotonic()
    if done and now - logged >= 10:
      logged, left = now, (now - begin) / done * (total - done)
      logging.info("evaluating %s: %d/%d batches, ETA %.0f s", name, done, total, left)


def compile_predict_step(predict_step: PredictStep, shardings: Any, mesh: Mesh) -> PredictStep:
  """Compiles a predict step: variables with `shardings`, batches and predictions by example."""
  split = sharding.batch_sharding(mesh)
  return jax.jit(predict_step, in_shardings=(shardings, split), out_shardings=split)
