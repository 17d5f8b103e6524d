"""Linear probes on frozen features, by L-BFGS and by SGD.

As iGPT's CIFAR and STL-10 probes (Chen et al., 2020, section 3.5): L-BFGS on fixed features without
augmentation. Regularisation and layer are selected on held-out training images; then the classifier
is fitted to all of them.
"""

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from vit_jax_zoo.metrics.majority_vote import majority_vote

RATES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03)


@dataclasses.dataclass(frozen=True)
class SgdRecipe:
  """Hyperparameters of the SGD probe.

  Attributes:
    rates: candidate learning rates.
    momentum: of SGD.
    num_epochs: passes over the images; the paper made a million steps.
    batch_size: limited to the number of images.
    seed: of the shuffle.
  """

  rates: tuple[float, ...] = RATES
  momentum: float = 0.9
  num_epochs: int = 100
  batch_size: int = 1024
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class LinearClassifiers:
  """One classifier for each learning rate, on standardised features.

  Attributes:
    mean: [d], subtracted from features.
    std: [d], divided by afterwards.
    weights: [r d k].
    bias: [r k].
  """

  mean: Float[np.ndarray, " d"]
  std: Float[np.ndarray, " d"]
  weights: Float[Array, "r d k"]
  bias: Float[Array, "r k"]

  def accuracies(
    self, features: Float[np.ndarray, "n *v d"], labels: Int[np.ndarray, " n"]
  ) -> list[float]:
    """Returns each classifier's accuracy; a diverged one is at chance level at best.

    With several views of each image, by majority vote.
    """
    hits = np.zeros(len(self.bias))
    for start in range(0, len(labels), _ROWS):
      x = ((features[start : start + _ROWS] - self.mean) / self.std).astype(np.float32)
      flat = jnp.asarray(x.reshape(-1, x.shape[-1]))
      found = np.asarray(_logits((self.weights, self.bias), flat)).argmax(axis=-1)
      named = np.stack([vote(row.reshape(x.shape[:-1])) for row in found])
      hits += (named == labels[start : start + _ROWS]).sum(axis=1)
    return list((hits / len(labels)).tolist())


_ROWS = 4096


def fit_by_sgd(
  features: Float[np.ndarray, "n d"],
  labels: Int[np.ndarray, " n"],
  num_classes: int,
  recipe: SgdRecipe = SgdRecipe(),
) -> LinearClassifiers:
  """Fits a softmax regression for each learning rate, from zero weights."""
  mean, std = features.mean(axis=0), features.std(axis=0)
  std = np.where(std > 0, std, 1)
  batch_size = min(recipe.batch_size, len(labels))
  steps_per_epoch = len(labels) // batch_size
  num_steps = recipe.num_epochs * steps_per_epoch
  shape = (len(recipe.rates), features.shape[1], num_classes)
  parameters = jnp.zeros(shape), jnp.zeros((shape[0], shape[2]))
  momenta = jax.tree.map(jnp.zeros_like, parameters)
  rates, momentum = np.asarray(recipe.rates, np.float32), jnp.float32(recipe.momentum)
  rng, step = np.random.default_rng(recipe.seed), 0
  for _ in range(recipe.num_epochs):
    order = rng.permutation(len(labels))
    for start in range(0, steps_per_epoch * batch_size, batch_size):
      rows = order[start : start + batch_size]
      x = ((features[rows] - mean) / std).astype(np.float32)
      falling = rates * np.float32((1 + np.cos(np.pi * step / num_steps)) / 2)
      batch = jnp.asarray(x), jnp.asarray(labels[rows], jnp.int32)
      parameters, momenta = _step(parameters, momenta, *batch, jnp.asarray(falling), momentum)
      step += 1
  return LinearClassifiers(mean, std, *parameters)


def _logits(parameters: tuple[Array, Array], x: Float[Array, "n d"]) -> Float[Array, "r n k"]:
  weights, bias = parameters
  return jnp.einsum("nd,rdk->rnk", x, weights) + bias[:, None]


def _loss(
  parameters: tuple[Array, Array], x: Float[Array, "n d"], labels: Int[Array, " n"]
) -> Float[Array, ""]:
  logits = _logits(parameters, x)
  targets = jnp.broadcast_to(labels, logits.shape[:2])
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return jnp.sum(jnp.mean(losses, axis=1))  # the rates' parameters have nothing in common


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _step(
  parameters: tuple[Array, Array],
  momenta: tuple[Array, Array],
  x: Float[Array, "n d"],
  labels: Int[Array, " n"],
  rates: Float[Array, " r"],
  momentum: Float[Array, ""],
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
  gradients = jax.grad(_loss)(parameters, x, labels)
  momenta = jax.tree.map(lambda m, g: momentum * m + g, momenta, gradients)
  parameters = jax.tree.map(
    lambda p, m: p - rates.reshape(-1, *(1,) * (p.ndim - 1)) * m, parameters, momenta
  )
  return parameters, momenta


STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Inverse regularisation strengths to choose from."""


@dataclasses.dataclass(frozen=True)
class ProbeScore:
  """Result of a probe on one kind of feature.

  Attributes:
    validation: accuracy on held-out images at the best strength.
    test: accuracy on the test images, fitted to all training images at that strength.
    strength: the selected one.
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
  """Returns the accuracy of a linear classifier on each kind of feature.

  Args:
    fit: training images.
    test: test images.
    strengths: candidate inverse regularisation strengths.
    held_out: which training images select the strength; see `hold_out` by default.

  Raises:
    ValueError: there is one class only, or too few images to hold some out.
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
  """Returns a random subset of images for selection.

  Raises:
    ValueError: the other images have one class only, or there are too few.
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
  """Fits a logistic regression to standardised features; returns its test accuracy.

  With several views of each test image, by majority vote.
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
  """Returns each image's label, by majority vote over its views."""
  if labels.ndim == 1:
    return labels
  return np.asarray(majority_vote(jnp.asarray(labels.T), jax.random.key(0)))
