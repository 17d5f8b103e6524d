"""The products for CPUs against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vit_jax_zoo.ops.attention import matrix_product
from vit_jax_zoo.ops.sharding import is_for_cpu


@pytest.mark.parametrize(
  ("features", "axis", "shape"),
  [(6, -1, (2, 5, 8)), ((2, 3), -1, (2, 5, 8)), (6, (-2, -1), (2, 5, 4, 2)), (6, -1, (8,))],
)
def test_dense_layers_have_the_same_parameters_and_results(features, axis, shape):
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


def test_the_platform_is_that_of_the_mesh():
  assert is_for_cpu()
  tpu = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=tpu)
  with jax.sharding.use_abstract_mesh(mesh):
    assert not is_for_cpu()
