"""Few-shot linear accuracy: closed-form ridge regression on a few images per class.

As the ViT paper tracks pre-training (Dosovitskiy et al., 2021, section 4.1: "a regularised
least-squares regression problem that maps the frozen representation of a subset of training images
to {-1, 1}^K"), with big_vision's constants. In float64: the constant feature dominates the
spectrum, so that float32 would lose three or more digits of the weights.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int

SHOTS = (1, 5, 10, 25)
SEEDS = (0, 1, 2)
L2 = 2.0**10
BIAS = 100.0
"""The constant feature; the regularisation counts it like any other."""

STD_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class RidgeClassifier:
  """A linear map from features to a score for each class.

  Attributes:
    mean: [d], subtracted from features.
    std: [d], divided by afterwards.
    weights: [d+1 k]; the last row is that of the constant feature.
  """

  mean: Float[np.ndarray, " d"]
  std: Float[np.ndarray, " d"]
  weights: Float[np.ndarray, "d_and_1 k"]

  @classmethod
  def fit(
    cls,
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    num_classes: int,
    l2: float = L2,
  ) -> "RidgeClassifier":
    """Solves `(X'X + l2 I) w = X'Y`, where Y is 1 at a row's label and -1 elsewhere."""
    x = np.asarray(features, np.float64)
    mean, std = x.mean(axis=0), x.std(axis=0) + STD_EPSILON
    targets = np.where(labels[:, None] == np.arange(num_classes), 1.0, -1.0)
    return cls(mean, std, solve_ridge(_with_bias((x - mean) / std), targets, l2))

  def scores(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n k"]:
    """Returns the classes' scores, float64."""
    return _with_bias((np.asarray(features, np.float64) - self.mean) / self.std) @ self.weights


def solve_ridge(
  x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n k"], l2: float
) -> Float[np.ndarray, "d k"]:
  """Minimises `|x w - y|^2 + l2 |w|^2`, through whichever of x'x and xx' is smaller."""
  rows, columns = x.shape
  if rows >= columns:
    return scipy.linalg.solve(x.T @ x + l2 * np.eye(columns), x.T @ y, assume_a="pos")
  return x.T @ scipy.linalg.solve(x @ x.T + l2 * np.eye(rows), y, assume_a="pos")


def choose_shots(labels: Int[np.ndarray, " n"], shots: int, seed: int) -> Int[np.ndarray, " m"]:
  """Returns the rows to fit to: `shots` per class, or all where a class has fewer.

  One generator permutes the rows of one class after the other, so that for one seed the choice with
  more shots contains the one with fewer.
  """
  rng = np.random.default_rng(seed)
  rows = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
  return np.concatenate([row[:shots] for row in rows])


def few_shot_accuracies(
  features: Float[np.ndarray, "n d"],
  labels: Int[np.ndarray, " n"],
  test_features: Float[np.ndarray, "m d"],
  test_labels: Int[np.ndarray, " m"],
  *,
  shots: Sequence[int] = SHOTS,
  seeds: Sequence[int] = SEEDS,
  l2: float = L2,
) -> dict[int, list[float]]:
  """Returns the test accuracies by number of shots, one for each seed."""
  num_classes = int(max(labels.max(), test_labels.max())) + 1
  accuracies: dict[int, list[float]] = {}
  for count in shots:
    for seed in seeds:
      rows = choose_shots(labels, count, seed)
      classifier = RidgeClassifier.fit(features[rows], labels[rows], num_classes, l2)
      right = classifier.scores(test_features).argmax(axis=1) == test_labels
      accuracies.setdefault(count, []).append(float(right.mean()))
  return accuracies


def _with_bias(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d_and_1"]:
  return np.concatenate([x, np.full((len(x), 1), BIAS)], axis=1)
