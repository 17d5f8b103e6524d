"""1x1 convolutions: values and gradients of `nn.Conv`; the kernel gradient's computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vit_jax_zoo.nn.resnet import pointwise_conv


def convs(stride, **fields):
  plain = nn.Conv(4, (1, 1), (stride, stride), padding=((0, 0), (0, 0)), use_bias=False, **fields)
  return plain.clone(conv_general_dilated=pointwise_conv), plain


def gradients(module, variables, x):
  return jax.grad(lambda v, x: jnp.sum(jnp.sin(module.apply(v, x))), (0, 1))(variables, x)


@pytest.mark.parametrize(("stride", "side"), [(1, 5), (2, 5), (2, 6)])
def test_values_and_gradients_equal_conv(stride, side):
  ours, plain = convs(stride)
  x = jax.random.normal(jax.random.key(1), (2, side, side + 1, 3))
  variables = plain.init(jax.random.key(0), x)
  np.testing.assert_array_equal(ours.apply(variables, x), plain.apply(variables, x))
  (found, input_gradient), (expected, plain_input_gradient) = (
    gradients(m, variables, x) for m in (ours, plain)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
  np.testing.assert_array_equal(input_gradient, plain_input_gradient)


def test_kernel_gradient_is_matrix_product():
  x = jnp.ones((1, 4, 4, 3))
  ours, plain = convs(1)
  variables = plain.init(jax.random.key(0), x)
  counts = [str(jax.make_jaxpr(gradients, 0)(m, variables, x)) for m in (ours, plain)]
  assert [text.count("= dot_general[") for text in counts] == [1, 0]
  assert [text.count("= conv_general_dilated[") for text in counts] == [2, 3]


def test_bfloat16():
  ours, _ = convs(2, dtype="bfloat16")
  x = jnp.ones((1, 4, 4, 3))
  variables = ours.init(jax.random.key(0), x)
  assert ours.apply(variables, x).dtype == jnp.bfloat16
  assert jax.tree.leaves(gradients(ours, variables, x)[0])[0].dtype == jnp.float32
