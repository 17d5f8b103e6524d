"""Linear probes: what logistic regression makes of features, layer by layer.

As iGPT's CIFAR and STL-10 probes (Chen et al., 2020, section 3.5): L-BFGS on fixed features without
augmentation. A part of the images to fit to is held out; on it the regularisation and the best
layer are chosen, then everything is fitted again to all of them.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Inverse regularisation strengths to choose from."""


@dataclasses.dataclass(frozen=True)
class ProbeScore:
  """What a probe of one kind of feature reached.

  Attributes:
    validation: accuracy on the held-out part of the images to fit to, at the best strength.
    test: accuracy on the test images, fitted to all others at that strength.
    strength: the one chosen.
  """

  validation: float
  test: float
  strength: float


@dataclasses.dataclass(frozen=True)
class Labelled:
  """Features by name, and labels.

  Attributes:
    features: arrays [b d] whose rows belong to the same images.
    labels: int [b].
  """

  features: Mapping[str, Float[np.ndarray, "b _"]]
  labels: Int[np.ndarray, " b"]


def probe(
  fit: Labelled,
  test: Labelled,
  *,
  strengths: Sequence[float] = STRENGTHS,
  validation_share: float = 0.1,
  seed: int = 0,
) -> dict[str, ProbeScore]:
  """Returns what a linear classifier reaches on each kind of feature.

  Args:
    fit: images to fit to.
    test: images to score.
    strengths: inverse regularisation strengths to choose from.
    validation_share: of the images to fit to, held out to choose.
    seed: which of them.

  Raises:
    ValueError: there is but one class to tell apart, or too few images to hold some out.
  """
  held_out = np.random.default_rng(seed).permutation(len(fit.labels)) < round(
    validation_share * len(fit.labels)
  )
  if not held_out.any() or len(np.unique(fit.labels[~held_out])) < 2:
    raise ValueError(
      f"{len(fit.labels)} images of {len(np.unique(fit.labels))} classes are too few to probe with"
    )
  scores = {}
  for name, array in fit.features.items():
    left, right = array[~held_out], array[held_out]
    accuracies = [
      accuracy(left, fit.labels[~held_out], right, fit.labels[held_out], strength)
      for strength in strengths
    ]
    best = int(np.argmax(accuracies))
    reached = accuracy(array, fit.labels, test.features[name], test.labels, strengths[best])
    scores[name] = ProbeScore(accuracies[best], reached, strengths[best])
  return scores


def accuracy(
  features: Float[np.ndarray, "b d"],
  labels: Int[np.ndarray, " b"],
  test_features: Float[np.ndarray, "n d"],
  test_labels: Int[np.ndarray, " n"],
  strength: float,
) -> float:
  """Fits a logistic regression to standardised features, and returns its accuracy on others."""
  from sklearn.exceptions import ConvergenceWarning  # slow to import, and needed at the end
  from sklearn.linear_model import LogisticRegression
  from sklearn.pipeline import make_pipeline
  from sklearn.preprocessing import StandardScaler

  classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConvergenceWarning)  # what it has reached by then is scored
    classifier.fit(features, labels)
  return float(classifier.score(test_features, test_labels))
