"""Evaluations: predictions or probed features, each example counted once over all hosts."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from matplotlib.figure import Figure

from vit_jax_zoo.figures.curves import draw_probe
from vit_jax_zoo.metrics import feature_probes
from vit_jax_zoo.metrics.base import real_rows
from vit_jax_zoo.metrics.feature_probes import FeatureProbe, FeatureScore, Labelled
from vit_jax_zoo.tasks.base import Variables
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.distributed import all_gather_objects, is_primary
from vit_jax_zoo.training.train_step import EvaluationProgram, PredictStep

T = TypeVar("T")


@dataclasses.dataclass
class Report:
  """Scores and figures of an evaluation, by name."""

  scores: dict[str, float]
  figures: dict[str, Figure] = dataclasses.field(default_factory=dict)


Evaluation: TypeAlias = Callable[[Variables], Report]  # called on all processes


@runtime_checkable
class Batches(Sized, Iterable[dict[str, np.ndarray]], Protocol):
  """A finite sequence of batches, of the same length on every process."""


def score_predictions(
  variables: Variables,
  *,
  program: EvaluationProgram,
  batches: Callable[[], Batches],
  name: str,
  metrics: Sequence[str] = (),
) -> Report:
  """Returns a split's scores (of `metrics`, or all), "skipped_images" if any, and figures."""
  task, mesh, data = program.task, program.mesh, batches()
  evaluator, figures = task.evaluator(), dict[str, Figure]()
  pairs = predict_batches(program.predict_step, variables, data, mesh, name, len(data))
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
  variables: Variables, *, program: EvaluationProgram, load_batch: Callable[[], dict[str, Any]]
) -> Report:
  """Returns figures of a batch's attention maps and other intermediates, on process 0."""
  batch = load_batch()
  real = real_rows(batch, len(next(iter(batch.values()))))
  if len(real):  # padding is replaced by repeated examples
    batch = {key: value[np.resize(real, len(value))] for key, value in batch.items()}
  try:
    explanation = program.explain_step(variables, sharding.to_global(batch, program.mesh))
    if is_primary():
      images, model = program.task.draw_explanation(jax.device_get(explanation))
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
  step: PredictStep, variables: Variables, batches: Iterable[Any], mesh: Mesh, name: str, total: int
) -> Iterator[tuple[Any, Any]]:
  """Yields batches with their predictions, one batch behind, so that the device does not wait."""
  begin = logged = time.monotonic()
  ahead = None
  for done, batch in enumerate(itertools.chain(batches, [None])):
    latest = None
    if batch is not None:
      latest = batch, step(variables, sharding.to_global(batch, mesh))
    if ahead is not None:
      yield ahead[0], sharding.to_local(ahead[1])
    ahead, now = latest, time.monotonic()
    if done and now - logged >= 10:
      logged, left = now, (now - begin) / done * (total - done)
      logging.info("evaluating %s: %d/%d batches, ETA %.0f s", name, done, total, left)


def probe_features(
  variables: Variables,
  *,
  program: EvaluationProgram,
  batches: Callable[..., Batches],
  name: str,
  probe: FeatureProbe,
) -> Report:
  """Fits a probe to the features of `batches(to_fit=True)` and scores it on those of `batches()`.

  All features are kept on the host, in float32. Scores: the probe's (for features by layer of the
  best layer, "best_layer", selected on held-out images of the fitted split), and the accuracy of
  each layer, "layer_<i>", or kind ("pixels").
  """
  step, mesh, views = program.features_step, program.mesh, program.task.feature_views
  fit = collect_features(step, variables, batches(to_fit=True), mesh, name)
  test = collect_features(step, variables, batches(), mesh, name, views)
  logging.info("probing %s: %d and %d images", name, len(fit.labels), len(test.labels))
  return report(probe(fit, test), probe.title)


def report(results: dict[str, FeatureScore], title: str) -> Report:
  """Returns the scores of the best features, and the accuracy of all others by name."""
  best = feature_probes.choose_features(results)
  scores = dict(results[best].scores)
  accuracies = {name: score.scores["accuracy"] for name, score in results.items()}
  if not (layers := [name for name in results if name.startswith("layer_")]):
    return Report(scores | {k: v for k, v in accuracies.items() if k != best})
  index = layers.index(best)
  scores |= accuracies | {"best_layer": float(index)}
  references = [(name, value) for name, value in accuracies.items() if name not in layers]
  curve = [accuracies[name] for name in layers]
  draw_depth = functools.partial(draw_probe, curve, index, references, title=f"{title} by depth")
  return Report(scores, draw(title, lambda: {"depth": draw_depth()}))


def collect_features(
  step: PredictStep, variables: Variables, batches: Batches, mesh: Mesh, name: str, views: int = 1
) -> Labelled:
  """Returns features [b d] ([b v d] of several views) and labels of all hosts' real rows.

  The number of a view is `view` in the batch. ValueError if an image has no label, or several.
  """
  labels: list[np.ndarray] = []
  features: dict[str, list[np.ndarray]] = {}
  each, total = _each_view(batches, views), len(batches) * views
  pairs = predict_batches(step, variables, each, mesh, name, total)
  for number, (batch, found) in enumerate(pairs):
    if "label" not in batch or np.ndim(batch["label"]) != 1:
      raise ValueError(f"evaluation {name!r}: no single label; feature probes need one per image")
    real = np.asarray(batch["mask"], bool)
    if number % views == 0:
      labels.append(np.asarray(batch["label"])[real])
    for key, array in feature_probes.by_layer(found).items():
      features.setdefault(key, []).append(array[real])
  joined = {}
  for key, arrays in features.items():
    by_view = [np.concatenate(arrays[view::views]) for view in range(views)]
    joined[key] = by_view[0] if views == 1 else np.stack(by_view, axis=1)
  parts = gather_parts((joined, np.concatenate(labels)), mesh)
  whole = {key: np.concatenate([part[0][key] for part in parts]) for key in joined}
  return Labelled(whole, np.concatenate([part[1] for part in parts]))


def _each_view(batches: Batches, views: int) -> Iterator[dict[str, np.ndarray]]:
  for batch in batches:
    for view in range(views):
      number = {} if views == 1 else {"view": np.full(len(batch["mask"]), view, np.int32)}
      yield {**batch, **number}
