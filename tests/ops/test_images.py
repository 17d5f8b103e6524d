"""Image normalisation on the device."""

import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.ops.images import clear_padding, normalize_images, pad_images


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_default_range_minus_one_to_one(dtype):
  images = np.arange(0, 240, 5, dtype=dtype).reshape(1, 4, 4, 3)
  expected = (images.astype(np.float32) - 127.5) / 127.5
  np.testing.assert_allclose(normalize_images(jnp.asarray(images)), expected, atol=1e-7)
  assert normalize_images(jnp.asarray(images)).dtype == np.float32


def test_per_channel_mean_and_std():
  images = np.full((1, 1, 1, 3), 255, np.uint8)
  out = normalize_images(jnp.asarray(images), mean=(0.0, 0.5, 1.0), std=(1.0, 0.25, 0.5))
  np.testing.assert_allclose(out[0, 0, 0], [1.0, 2.0, 0.0], atol=1e-6)


def test_channel_count_mismatch_raises():
  images = np.zeros((1, 2, 2, 1), np.uint8)
  with pytest.raises(ValueError, match="image_std: 3 values"):
    normalize_images(jnp.asarray(images), std=(1.0, 1.0, 1.0))


def test_clear_padding_and_pad_images():
  images = jnp.ones((2, 3, 5, 1))
  cleared = clear_padding(images, jnp.asarray([[3, 5], [2, 1]]))
  assert np.asarray(cleared).sum(axis=(1, 2, 3)).tolist() == [15, 2]
  padded = np.asarray(pad_images(images, 4))
  assert padded.shape == (2, 4, 8, 1)
  assert padded[:, :3, :5].all()
  assert padded.sum() == 30
  assert pad_images(images, 1).shape == images.shape
