"""The evaluation that fits linear classifiers to a model's features, layer by layer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging
from jax.sharding import Mesh

from vit_jax_zoo.evaluation.linear_probe import Labelled, probe
from vit_jax_zoo.tasks.base import Variables
from vit_jax_zoo.train.evaluate import Report, SizedBatches, gather_parts, predict_batches
from vit_jax_zoo.train.step import PredictStep
from vit_jax_zoo.visualize.probe import draw_probe


@dataclasses.dataclass(frozen=True)
class LinearProbe:
  """Fits to the features of one split, and scores on those of another.

  All features are kept on the host, in float32: images x layers x width numbers.

  Scores: "layer_<i>", the test accuracy of each layer; "best_layer", chosen on a held-out part of
  the split to fit to, and its test "accuracy"; and one for each other kind of feature, such as
  "pixels". Draws accuracy against depth.

  Attributes:
    features_step: compiled `task.features`, see `compile_predict_step`; `layers` [b l d] are
      probed one by one, anything else [b d] as a whole.
    fit_batches: makes the batches to fit to anew: this process's part of each.
    test_batches: the same of those to score.
    mesh: where to compute features.
    name: of the evaluation, for the log.
  """

  features_step: PredictStep
  fit_batches: Callable[[], SizedBatches]
  test_batches: Callable[[], SizedBatches]
  mesh: Mesh
  name: str

  def __call__(self, variables: Variables) -> Report:
    """Returns the probes' scores and their picture."""
    fit = self._collect(variables, self.fit_batches())
    test = self._collect(variables, self.test_batches())
    logging.info("probing %s: %d and %d images", self.name, len(fit.labels), len(test.labels))
    found = probe(fit, test)
    layers = [found[name] for name in found if name.startswith("layer_")]
    others = {name: score for name, score in found.items() if not name.startswith("layer_")}
    best = int(np.argmax([score.validation for score in layers]))
    scores = {name: score.test for name, score in found.items()}
    scores |= {"best_layer": float(best), "accuracy": layers[best].test}
    references = [(name, score.test) for name, score in others.items()]
    figure = draw_probe([score.test for score in layers], best, references)
    return Report(scores, {"depth": figure})

  def _collect(self, variables: Variables, batches: SizedBatches) -> Labelled:
    """Returns the real rows of all hosts, each once."""
    labels: list[np.ndarray] = []
    features: dict[str, list[np.ndarray]] = {}
    for batch, found in predict_batches(self.features_step, variables, batches, self.mesh):
      real = np.asarray(batch["mask"], bool)
      labels.append(np.asarray(batch["label"])[real])
      for name, array in _by_layer(found).items():
        features.setdefault(name, []).append(array[real])
    joined = {name: np.concatenate(arrays) for name, arrays in features.items()}
    parts = gather_parts((joined, np.concatenate(labels)), self.mesh)
    return Labelled(
      {name: np.concatenate([part[0][name] for part in parts]) for name in joined},
      np.concatenate([part[1] for part in parts]),
    )


def _by_layer(found: Any) -> dict[str, np.ndarray]:
  arrays = {name: np.asarray(array, np.float32) for name, array in found.items()}
  layers = arrays.pop("layers")
  digits = len(str(layers.shape[1] - 1))
  return {f"layer_{i:0{digits}d}": layers[:, i] for i in range(layers.shape[1])} | arrays
