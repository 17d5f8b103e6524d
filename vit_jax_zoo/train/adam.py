"""Adam with a bias correction that float32 does not spoil.

optax 0.2.8 computes 1 - 0.999^t in float32, where 0.999 itself is rounded: the first steps are off
by 7e-6 of their length, for all parameters alike. That is enough to leave the course of a reference
run (DETR's matchings have ties closer than that after ten steps).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax


def scale_by_adam(
  b1: float,
  b2: float,
  eps: float,
  *,
  mu_dtype: Any = None,
  nesterov: bool = False,
) -> optax.GradientTransformation:
  """Returns Adam's direction. Kingma & Ba, arXiv:1412.6980, algorithm 1.

  The state is optax's, and so is the meaning of the arguments; see `optax.scale_by_adam`.

  Args:
    b1: share of the old mean of gradients that a step keeps, in [0, 1).
    b2: share of the old mean of squared gradients, in [0, 1).
    eps: added to the root.
    mu_dtype: of the mean of gradients in the state; that of the parameters if None.
    nesterov: looks one step ahead (NAdam).
  """

  def init(params: Any) -> optax.ScaleByAdamState:
    mu = optax.tree.zeros_like(params, dtype=mu_dtype)
    return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, optax.tree.zeros_like(params))

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
    del params
    gradients = updates
    mu = jax.tree.map(lambda g, m: (1 - b1) * g + b1 * m, gradients, state.mu)
    nu = jax.tree.map(lambda g, n: (1 - b2) * g * g + b2 * n, gradients, state.nu)
    count = jnp.asarray(optax.safe_increment(state.count))
    mean = jax.tree.map(lambda m: m / _correction(b1, count), mu)
    if nesterov:
      ahead = jax.tree.map(lambda m: m / _correction(b1, jnp.add(count, 1)), mu)
      mean = jax.tree.map(
        lambda m, g: b1 * m + (1 - b1) * g / _correction(b1, count), ahead, gradients
      )
    direction = jax.tree.map(
      lambda m, n: m / (jnp.sqrt(n / _correction(b2, count)) + eps), mean, nu
    )
    return direction, optax.ScaleByAdamState(count, optax.tree.cast(mu, mu_dtype), nu)

  return optax.GradientTransformation(init, update)


def _correction(decay: float, count: jax.Array) -> jax.Array | float:
  """Returns 1 - decay^count to the last digit: the logarithm is taken in float64."""
  return -jnp.expm1(count.astype(jnp.float32) * math.log(decay)) if decay else 1.0
