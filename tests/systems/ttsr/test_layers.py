"""Layers of TTSR: convolution of concatenated maps, bicubic upsampling, pixel shuffle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vit_jax_zoo.systems.ttsr.losses import Conv
from vit_jax_zoo.systems.ttsr.model import ConcatConv, pixel_shuffle, upsample_bicubic


def maps():
  rng = np.random.default_rng(0)
  shapes = ((2, 8, 12, 3), (2, 2, 3, 4), (2, 4, 6, 2))
  return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def test_concat_conv_equals_conv_of_concatenated_maps():
  own, small, middle = maps()
  concatenated = jnp.concatenate(
    [own, nn.relu(upsample_bicubic(small, 4)), nn.relu(upsample_bicubic(middle, 2))], axis=-1
  )
  variables = jax.jit(Conv(5).init)(jax.random.key(0), concatenated)

  def result(variables, joint):
    if joint:
      return ConcatConv(5).apply(variables, own, small, middle, factors=(1, 4, 2))
    return Conv(5).apply(variables, concatenated)

  @functools.partial(jax.jit, static_argnums=1)
  def both(variables, joint):
    gradient = jax.grad(lambda v: jnp.sum(result(v, joint) ** 2))(variables)
    return result(variables, joint), gradient["params"]["kernel"]

  for ours, theirs in zip(both(variables, True), both(variables, False), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(both(variables, True)[0], both(variables, False)[0], atol=1e-5)


def test_concat_conv_initializes_like_conv():
  own, *_ = maps()
  ours = ConcatConv(5).init(jax.random.key(0), own, own)
  theirs = Conv(5).init(jax.random.key(0), jnp.concatenate([own, own], axis=-1))
  assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
  assert ConcatConv(5, dtype="bfloat16").apply(ours, own, own).dtype == jnp.bfloat16


@pytest.mark.parametrize("factor", [2, 4])
def test_upsample_bicubic_equals_torch(load_golden, factor):
  _, inputs, outputs = load_golden("ttsr_fn_a")
  x = jnp.asarray(np.moveaxis(inputs["bicubic_in"], 1, -1))
  upsampled = np.moveaxis(upsample_bicubic(x, factor), -1, 1)
  np.testing.assert_allclose(upsampled, outputs[f"torch_bicubic_x{factor}"], atol=1e-6)


def test_upsample_bicubic_keeps_constants():
  x = jnp.full((1, 2, 3, 1), 0.7, jnp.bfloat16)
  assert upsample_bicubic(x, 4).dtype == jnp.bfloat16
  np.testing.assert_allclose(upsample_bicubic(x, 4).astype(np.float32), 0.7, atol=5e-3)


def test_pixel_shuffle_is_row_major():
  x = jnp.arange(8.0).reshape(1, 1, 1, 8)
  np.testing.assert_array_equal(pixel_shuffle(x, 2)[0, :, :, 0], [[0, 1], [2, 3]])
  np.testing.assert_array_equal(pixel_shuffle(x, 2)[0, :, :, 1], [[4, 5], [6, 7]])
