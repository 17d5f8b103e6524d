"""Adam against a float64 implementation, and against optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax_zoo.training.optim import scale_by_adam


def adam_in_float64(gradients, b1, b2, eps):
  """Returns the update directions of all steps."""
  mu, nu, directions = 0.0, 0.0, []
  for step, g in enumerate(gradients.astype(np.float64), start=1):
    mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g * g
    directions.append(mu / (1 - b1**step) / (np.sqrt(nu / (1 - b2**step)) + eps))
  return np.array(directions)


@pytest.mark.parametrize("b1", [0.9, 0.0])
@pytest.mark.parametrize("b2", [0.999, 0.95])
def test_directions_equal_float64_adam(b1, b2):
  gradients = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
  adam = scale_by_adam(b1, b2, 1e-8)
  state, update = adam.init(jnp.zeros(5)), jax.jit(adam.update)
  for gradient, expected in zip(gradients, adam_in_float64(gradients, b1, b2, 1e-8), strict=True):
    direction, state = update(jnp.asarray(gradient), state)
    np.testing.assert_allclose(direction, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mu_dtype", [None, jnp.bfloat16])
def test_options_equal_optax(nesterov, mu_dtype):
  arguments = {"b1": 0.9, "b2": 0.99, "eps": 1e-3, "mu_dtype": mu_dtype, "nesterov": nesterov}
  ours, theirs = scale_by_adam(**arguments), optax.scale_by_adam(**arguments)
  params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
  states = ours.init(params), theirs.init(params)
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
  rng = np.random.default_rng(1)
  for _ in range(5):
    gradients = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    left, state = ours.update(gradients, states[0])
    right, other = theirs.update(gradients, states[1])
    states = state, other
    for a, b in ((left, right), (state, other)):
      jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), a, b)
      assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)
