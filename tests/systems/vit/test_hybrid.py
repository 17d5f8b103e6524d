"""ResNet of the hybrids: scanned equals unrolled, with and without remat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from vit_jax_zoo.systems.vit.hybrid import StandardizedConv, StandardizedResNet
from vit_jax_zoo.weights import key_map as table

SIZES = {"stage_sizes": (3,), "width": 32}


def loss_and_gradients(model, params, images):
  def loss(params):
    return jnp.sum(jnp.sin(model.apply({"params": params}, images)))

  value, gradients = jax.jit(jax.value_and_grad(loss))(params)
  return float(value), traverse_util.flatten_dict(gradients, sep="/")


@pytest.mark.parametrize("remat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_scanned_units_equal_unrolled(remat):
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  scanned = StandardizedResNet(**SIZES, remat=remat)
  unrolled = StandardizedResNet(**SIZES, scan_layers=False)
  shapes = jax.eval_shape(lambda: scanned.init(jax.random.key(0), images))["params"]
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  flat = traverse_util.flatten_dict(params, sep="/")
  assert flat["stage_0_units/conv_2/kernel"].shape == (2, 3, 3, 32, 32)
  layers = table.unroll(flat)
  assert {"stage_0_unit_0/shortcut_conv/kernel", "stage_0_unit_2/conv_1/kernel"} < layers.keys()
  for key, array in table.stack(layers, flat).items():
    np.testing.assert_array_equal(array, flat[key])

  value, gradients = loss_and_gradients(scanned, params, images)
  expected, expected_gradients = loss_and_gradients(
    unrolled, traverse_util.unflatten_dict(layers, sep="/"), images
  )
  assert value == pytest.approx(expected, rel=1e-5)
  gradients = table.unroll(jax.device_get(gradients))
  assert gradients.keys() == expected_gradients.keys()
  for key, gradient in expected_gradients.items():
    np.testing.assert_allclose(gradients[key], gradient, atol=1e-5 * np.abs(gradient).max() + 1e-7)


def test_units_are_initialized_differently():
  model = StandardizedResNet(stage_sizes=(3,), width=32)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  first, second = params["stage_0_units"]["conv_1"]["kernel"]
  assert np.abs(first - second).max() > 0.01


def test_kernel_is_standardized():
  """The output is invariant to shift and scale of the kernel."""
  images = jax.random.normal(jax.random.key(0), (1, 5, 5, 3))
  conv = StandardizedConv(4, 3)
  kernel = np.random.default_rng(1).normal(size=(3, 3, 3, 4)).astype(np.float32)
  out = conv.apply({"params": {"kernel": kernel}}, images)
  again = conv.apply({"params": {"kernel": 3 * kernel + 0.5}}, images)
  np.testing.assert_allclose(out, again, atol=1e-3)
