"""1x1 convolutions as matrix products: the numbers and parameters of `nn.Conv`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vit_jax_zoo.layers.pointwise import PointwiseConv


@pytest.mark.parametrize(("stride", "side"), [(1, 5), (2, 5), (2, 6)])
def test_a_1x1_convolution(stride, side):
  x = jax.random.normal(jax.random.key(1), (2, side, side + 1, 3))
  plain = nn.Conv(4, (1, 1), (stride, stride), padding="VALID", use_bias=False)
  ours = PointwiseConv(4, stride)
  variables = ours.init(jax.random.key(0), x)
  jax.tree.map(np.testing.assert_array_equal, variables, plain.init(jax.random.key(0), x))

  def total(module, variables, x):
    return jnp.sum(jnp.sin(module.apply(variables, x)))

  np.testing.assert_allclose(ours.apply(variables, x), plain.apply(variables, x), atol=1e-6)
  given, expected = (jax.grad(total, (1, 2))(m, variables, x) for m in (ours, plain))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), given, expected)


def test_half_precision():
  x = jnp.ones((1, 2, 2, 3))
  module = PointwiseConv(4, dtype="bfloat16")
  variables = module.init(jax.random.key(0), x)
  assert module.apply(variables, x).dtype == jnp.bfloat16
  assert variables["params"]["kernel"].dtype == jnp.float32
