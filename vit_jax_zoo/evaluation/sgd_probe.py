"""A linear classifier by stochastic gradient descent: for more images than L-BFGS has patience for.

As ImageNet's linear probe in Chen et al., "Generative Pretraining from Pixels" (2020, appendix):
momentum 0.9, a rate from 30, 10, 3, ... that is searched on held-out images and falls to 0 with a
cosine, no weight decay. All rates learn at once, from the same batches.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from vit_jax_zoo.evaluation.linear_probe import vote

RATES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03)


@dataclasses.dataclass(frozen=True)
class SgdRecipe:
  """How the classifier learns.

  Attributes:
    rates: learning rates to choose from.
    momentum: of the descent.
    num_epochs: passes over the images; the paper made a million steps.
    batch_size: images of a step, or all of them where there are fewer.
    seed: of the order of the images.
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
    """Returns each classifier's accuracy; one that diverged is right by chance at best.

    Where there are several views of each image, the majority names the label.
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
  """Fits a softmax regression with each of the recipe's learning rates; they start from zeros."""
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
