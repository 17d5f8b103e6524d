"""Nearest-neighbour resizing equals PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.ops.resize import nearest_indices, resize_nearest


def test_nearest_indices():
  assert nearest_indices(4, 2).tolist() == [0, 2]
  assert nearest_indices(3, 7).tolist() == [0, 0, 0, 1, 1, 2, 2]
  assert nearest_indices(7, 3).tolist() == [0, 2, 4]
  assert nearest_indices(1, 3).tolist() == [0, 0, 0]


def test_detr_masks_golden(load_golden):
  _, inputs, outputs = load_golden("detr_a")
  mask, expected = jnp.asarray(inputs["mask"]), outputs["mask_0"]
  got = resize_nearest(mask[..., None], expected.shape[1:])[..., 0]
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("size", [(3, 4), (6, 8), (7, 5), (2, 12)])
def test_values_and_gradients(size):
  x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
  rows, columns = nearest_indices(3, size[0]), nearest_indices(4, size[1])
  resized, pull_back = jax.vjp(lambda x: resize_nearest(x, size), x)
  np.testing.assert_array_equal(resized, x[:, rows][:, :, columns])
  # The gradient is the number of times that each pixel is used.
  (counts,) = pull_back(jnp.ones_like(resized))
  expected = np.outer(np.bincount(rows, minlength=3), np.bincount(columns, minlength=4))
  np.testing.assert_array_equal(counts, np.broadcast_to(expected[None, :, :, None], x.shape))
