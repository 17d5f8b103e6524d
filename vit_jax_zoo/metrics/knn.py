"""k-NN evaluation on frozen features.

Neighbours by cosine similarity vote with the weight `exp(similarity / temperature)`, as in Wu et
al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv:1805.01978,
section 3.4), and in DINO's evaluation, whose `k` and temperature are the defaults.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

NEIGHBOURS = (1, 5, 10, 20)
HEADLINE = 20
TEMPERATURE = 0.07
_CHUNK = 2**26
"""Similarities at a time: 256 MB of float32."""


def classify_by_neighbours(
  features: Float[np.ndarray, "n d"],
  labels: Int[np.ndarray, " n"],
  test_features: Float[np.ndarray, "m d"],
  *,
  neighbours: Sequence[int] = NEIGHBOURS,
  temperature: float | None = TEMPERATURE,
) -> dict[int, Int[np.ndarray, " m"]]:
  """Returns the predicted labels by number of neighbours.

  Args:
    features: of the training images.
    labels: of the training images.
    test_features: of the images to classify.
    neighbours: numbers of neighbours; limited to the number of training images.
    temperature: of the vote weights; None: equal weights. Ties go to the lowest class.
  """
  known, asked = _normalised(features), _normalised(test_features)
  most = min(max(neighbours), len(known))
  num_classes = int(labels.max()) + 1
  parts: dict[int, list[np.ndarray]] = {count: [] for count in neighbours}
  step = max(1, _CHUNK // len(known))
  for start in range(0, len(asked), step):
    similarities = asked[start : start + step] @ known.T
    nearest = _largest(similarities, most)
    near = np.take_along_axis(similarities, nearest, axis=1)
    weights = np.ones_like(near) if temperature is None else np.exp((near - 1) / temperature)
    for count in neighbours:
      votes = np.zeros((len(near), num_classes))
      rows = np.repeat(np.arange(len(near)), min(count, most))
      np.add.at(votes, (rows, labels[nearest[:, :count]].ravel()), weights[:, :count].ravel())
      parts[count].append(votes.argmax(axis=1))
  return {count: np.concatenate(found) for count, found in parts.items()}


def _normalised(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
  x = np.asarray(features, np.float32)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _largest(values: Float[np.ndarray, "m n"], count: int) -> Int[np.ndarray, "m k"]:
  columns = np.argpartition(values, values.shape[1] - count, axis=1)[:, -count:]
  order = np.argsort(-np.take_along_axis(values, columns, axis=1), axis=1, kind="stable")
  return np.take_along_axis(columns, order, axis=1)
