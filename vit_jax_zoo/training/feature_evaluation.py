"""Evaluation of frozen features: fits a probe to each layer and scores it."""

import functools
from collections.abc import Callable, Iterator

import numpy as np
from absl import logging
from jax.sharding import Mesh

from vit_jax_zoo.figures.curves import draw_probe
from vit_jax_zoo.metrics import feature_probes
from vit_jax_zoo.metrics.feature_probes import FeatureProbe, FeatureScore, Labelled
from vit_jax_zoo.tasks.base import Variables
from vit_jax_zoo.training.evaluate import Report, SizedBatches, draw, gather_parts, predict_batches
from vit_jax_zoo.training.train_step import PredictStep


def probe_features(  # noqa: PLR0913 (bound by keyword, once)
  variables: Variables,
  *,
  features_step: PredictStep,
  fit_batches: Callable[[], SizedBatches],
  test_batches: Callable[[], SizedBatches],
  mesh: Mesh,
  name: str,
  probe: FeatureProbe,
  views: int = 1,
) -> Report:
  """Fits a probe to the features of one split and scores it on another.

  `features_step` is the compiled `task.features`; all features are kept on the host, in float32.
  Scores: the probe's (for features by layer of the best layer, "best_layer", selected on held-out
  images of the fitted split), and the accuracy of each layer, "layer_<i>", or kind ("pixels").
  """
  fit = collect_features(features_step, variables, fit_batches(), mesh, name)
  test = collect_features(features_step, variables, test_batches(), mesh, name, views)
  logging.info("probing %s: %d and %d images", name, len(fit.labels), len(test.labels))
  return report(probe(fit, test), probe.title)


def report(results: dict[str, FeatureScore], title: str) -> Report:
  """Returns the scores of the best features, and the accuracy of all others by name."""
  best = feature_probes.choose_features(results)
  scores = dict(results[best].scores)
  accuracies = {name: score.scores["accuracy"] for name, score in results.items()}
  layers = [name for name in results if name.startswith("layer_")]
  if not layers:
    return Report(scores | {k: v for k, v in accuracies.items() if k != best})
  index = layers.index(best)
  scores |= accuracies | {"best_layer": float(index)}
  references = [(name, value) for name, value in accuracies.items() if name not in layers]
  curve = [accuracies[name] for name in layers]
  figure = functools.partial(draw_probe, title=f"{title} by depth")
  return Report(scores, draw(title, lambda: {"depth": figure(curve, index, references)}))


def collect_features(
  features_step: PredictStep,
  variables: Variables,
  batches: SizedBatches,
  mesh: Mesh,
  name: str,
  views: int = 1,
) -> Labelled:
  """Returns features [b d] ([b v d] of several views) and labels of all hosts' real rows.

  The number of a view is `view` in the batch. ValueError if an image has no label, or several.
  """
  labels: list[np.ndarray] = []
  features: dict[str, list[np.ndarray]] = {}
  each, total = _each_view(batches, views), len(batches) * views
  pairs = predict_batches(features_step, variables, each, mesh, name, total)
  for number, (batch, found) in enumerate(pairs):
    if "label" not in batch or np.ndim(batch["label"]) != 1:
      raise ValueError(f"evaluation {name!r}: no single label; feature probes need one per image")
    real = np.asarray(batch["mask"], bool)
    if number % views == 0:
      labels.append(np.asarray(batch["label"])[real])
    for key, array in feature_probes.by_layer(found).items():
      features.setdefault(key, []).append(array[real])
  joined = {key: _join_views(arrays, views) for key, arrays in features.items()}
  parts = gather_parts((joined, np.concatenate(labels)), mesh)
  whole = {key: np.concatenate([part[0][key] for part in parts]) for key in joined}
  return Labelled(whole, np.concatenate([part[1] for part in parts]))


def _each_view(batches: SizedBatches, views: int) -> Iterator[dict[str, np.ndarray]]:
  for batch in batches:
    for view in range(views):
      number = {} if views == 1 else {"view": np.full(len(batch["mask"]), view, np.int32)}
      yield {**batch, **number}


def _join_views(arrays: list[np.ndarray], views: int) -> np.ndarray:
  if views == 1:
    return np.concatenate(arrays)
  return np.stack([np.concatenate(arrays[view::views]) for view in range(views)], axis=1)
