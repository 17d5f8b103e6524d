"""Linear probes: what logistic regression makes of features, layer by layer.

As iGPT's CIFAR and STL-10 probes (Chen et al., 2020, section 3.5): L-BFGS on fixed features without
augmentation. A part of the images to fit to is held out; on it the regularisation and the best
layer are chosen, then everything is fitted again to all of them.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from vit_jax_zoo.ops.votes import majority_vote

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
    features: arrays [b d] whose rows belong to the same images; [b v d] of images to score, where
      several views of each vote.
    labels: int [b].
  """

  features: Mapping[str, Float[np.ndarray, "b *_"]]
  labels: Int[np.ndarray, " b"]


def probe(
  fit: Labelled,
  test: Labelled,
  *,
  strengths: Sequence[float] = STRENGTHS,
  held_out: Bool[np.ndarray, " b"] | None = None,
) -> dict[str, ProbeScore]:
  """Returns what a linear classifier reaches on each kind of feature.

  Args:
    fit: images to fit to.
    test: images to score.
    strengths: inverse regularisation strengths to choose from.
    held_out: those of the images to fit to on which to choose; by default see `hold_out`.

  Raises:
    ValueError: there is but one class to tell apart, or too few images to hold some out.
  """
  held_out = hold_out(fit.labels) if held_out is None else held_out
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


def hold_out(
  labels: Int[np.ndarray, " b"], *, share: float = 0.1, seed: int = 0
) -> Bool[np.ndarray, " b"]:
  """Returns which images to choose on: a share of them, drawn at random.

  Raises:
    ValueError: there is but one class among the others, or there are too few images.
  """
  held_out = np.random.default_rng(seed).permutation(len(labels)) < round(share * len(labels))
  if not held_out.any() or len(np.unique(labels[~held_out])) < 2:
    raise ValueError(
      f"{len(labels)} images of {len(np.unique(labels))} classes are too few to probe with"
    )
  return held_out


def accuracy(
  features: Float[np.ndarray, "b d"],
  labels: Int[np.ndarray, " b"],
  test_features: Float[np.ndarray, "n *v d"],
  test_labels: Int[np.ndarray, " n"],
  strength: float,
) -> float:
  """Fits a logistic regression to standardised features, and returns its accuracy on others.

  Where there are several views of each of these, the majority names the label.
  """
  from sklearn.exceptions import ConvergenceWarning  # slow to import, and needed at the end
  from sklearn.linear_model import LogisticRegression
  from sklearn.pipeline import make_pipeline
  from sklearn.preprocessing import StandardScaler

  classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConvergenceWarning)  # what it has reached by then is scored
    classifier.fit(features, labels)
  found = np.asarray(classifier.predict(test_features.reshape(-1, test_features.shape[-1])))
  return float(np.mean(vote(found.reshape(test_features.shape[:-1])) == test_labels))


def vote(labels: Int[np.ndarray, "n *v"]) -> Int[np.ndarray, " n"]:
  """Returns each image's label: that of the majority, where there are several views of it."""
  if labels.ndim == 1:
    return labels
  return np.asarray(majority_vote(jnp.asarray(labels.T), jax.random.key(0)))
