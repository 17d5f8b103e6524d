"""CPU matrix products and attention against JAX's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vit_jax_zoo.nn.attention import attend
from vit_jax_zoo.ops.attention import matrix_product
from vit_jax_zoo.ops.sharding import is_for_cpu

SHAPES = ((2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4), (2, 5, 3, 4))
QUERY, KEY, VALUE, WEIGHT = (
  jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(SHAPES)
)
MASKS = {
  "no mask": None,
  "keys": jnp.asarray([[True] * 4 + [False] * 3, [True] * 7])[:, None, None],
  "pairs": jax.random.bernoulli(jax.random.key(9), 0.5, (2, 3, 5, 7)).at[..., 0].set(True),
  "a row without keys": jnp.ones((1, 1, 5, 7), bool).at[:, :, 2].set(False),
}


def loss(implementation, mask, is_causal, *arrays):
  out = attend(*arrays, mask=mask, is_causal=is_causal, implementation=implementation)
  return jnp.sum(jnp.sin(out.astype(jnp.float32)) * WEIGHT)


def ours_and_theirs(function, mask, *arrays, is_causal=False):
  """`implementation` None selects this package's on CPU; "xla" is JAX's."""
  return (
    jax.jit(function(functools.partial(loss, name, mask, is_causal)))(*arrays)
    for name in (None, "xla")
  )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_values_and_gradients_equal_jax(mask, is_causal):
  def value_and_grad(function):
    return jax.value_and_grad(function, argnums=(0, 1, 2))

  pairs = ours_and_theirs(value_and_grad, MASKS[mask], QUERY, KEY, VALUE, is_causal=is_causal)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *pairs)


def test_second_derivatives_equal_jax():
  def gradient_norm(function):
    def norm(*arrays):
      return sum(jnp.sum(x * x) for x in jax.grad(function, argnums=(0, 1, 2))(*arrays))

    return jax.grad(norm, argnums=(0, 1, 2))

  pairs = ours_and_theirs(gradient_norm, MASKS["keys"], QUERY, KEY, VALUE)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *pairs)


def test_forward_mode_raises():
  with pytest.raises(TypeError, match="custom_vjp"):
    jax.jvp(functools.partial(loss, None, None, False, QUERY, KEY), (VALUE,), (VALUE,))


def test_bfloat16_gradients():
  arrays = [x.astype(jnp.bfloat16) for x in (QUERY, KEY, VALUE)]
  ours, theirs = ours_and_theirs(lambda f: jax.grad(f, argnums=(0, 1, 2)), None, *arrays)
  for a, b in zip(ours, theirs, strict=True):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.03)


@pytest.mark.parametrize(
  ("features", "axis", "shape"),
  [(6, -1, (2, 5, 8)), ((2, 3), -1, (2, 5, 8)), (6, (-2, -1), (2, 5, 4, 2)), (6, -1, (8,))],
)
def test_dense_layers_equal_flax(features, axis, shape):
  x = jax.random.normal(jax.random.key(0), shape)
  theirs = nn.DenseGeneral(features, axis=axis, bias_init=nn.initializers.normal(1))
  ours = theirs.clone(dot_general=matrix_product)
  variables = ours.init(jax.random.key(1), x)
  jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(jax.random.key(1), x))

  def gradients(module):
    return jax.grad(lambda v, x: jnp.sum(jnp.sin(module.apply(v, x))), argnums=(0, 1))(variables, x)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients(ours), gradients(theirs)
  )


def test_is_for_cpu_from_mesh():
  assert is_for_cpu()
  tpu = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=tpu)
  with jax.sharding.use_abstract_mesh(mesh):
    assert not is_for_cpu()
