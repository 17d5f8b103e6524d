"""Attention rollout and attention distances against hand-computed values."""

import jax
import numpy as np
import pytest

from vit_jax_zoo.systems.vit.figures import (
  attention_distances,
  attention_rollout,
  patch_tokens,
)


def random_maps(*shape):
  weights = np.random.default_rng(0).random(shape).astype(np.float32)
  return weights / weights.sum(axis=-1, keepdims=True)


def test_rollout_is_product_of_layers():
  weights = random_maps(3, 2, 4, 5, 5)
  rollout = attention_rollout(weights)
  one, two, three = (0.5 * w.mean(axis=1) + 0.5 * np.eye(5) for w in weights)
  np.testing.assert_allclose(rollout, three @ two @ one, rtol=1e-5)
  np.testing.assert_allclose(rollout.sum(axis=-1), 1, rtol=1e-5)


def test_rollout_of_identity_is_identity():
  weights = np.broadcast_to(np.eye(4, dtype=np.float32), (2, 1, 3, 4, 4))
  np.testing.assert_array_equal(attention_rollout(weights)[0], np.eye(4))


def test_rollout_of_chained_attention():
  # Layer 2 attends from 0 to 1 and layer 1 from 1 to 2; half of each token is itself.
  first, second = np.eye(3, dtype=np.float32)[[0, 2, 1]], np.eye(3, dtype=np.float32)[[1, 1, 2]]
  weights = np.stack([first, second])[:, None, None]
  np.testing.assert_array_equal(attention_rollout(weights)[0, 0], [0.5, 0.25, 0.25])


def test_attention_distance_of_local_and_uniform_heads():
  grid, count = (2, 3), 6
  local = np.eye(count)
  even = np.full((count, count), 1 / count)
  right = np.eye(count)[[1, 2, 2, 4, 5, 5]]  # attends to the right neighbour, at the edge to itself
  weights = np.stack([local, even, right]).astype(np.float32)[None, None]
  distances = attention_distances(weights, grid, patch_size=16.0)
  y, x = np.divmod(np.arange(count), 3)
  mean = np.hypot(y[:, None] - y, x[:, None] - x).mean()
  np.testing.assert_allclose(distances, [[0, 16 * mean, 16 * 4 / 6]], rtol=1e-5)


def test_attention_distance_ignores_class_token():
  patches = random_maps(2, 1, 3, 4, 4)
  weights = np.full((2, 1, 3, 5, 5), 0.3, np.float32)
  weights[..., 1:, 1:] = 0.7 * patches
  np.testing.assert_allclose(
    attention_distances(weights, (2, 2)), attention_distances(patches, (2, 2)), rtol=1e-5
  )


def test_attention_distance_with_wrong_grid_raises():
  with pytest.raises(ValueError, match="attention maps: 4 tokens"):
    attention_distances(random_maps(1, 1, 1, 4, 4), (3, 3))


def test_patch_tokens_are_last_along_axis():
  tokens = np.arange(2 * 5).reshape(2, 5).astype(np.float32)
  np.testing.assert_array_equal(patch_tokens(tokens, (2, 2), axis=1), tokens[:, 1:])
  np.testing.assert_array_equal(patch_tokens(tokens.T, (1, 3), axis=0), tokens.T[2:])


def test_rollout_jit_equals_eager():
  weights = random_maps(2, 1, 3, 5, 5)
  np.testing.assert_allclose(
    jax.jit(attention_rollout)(weights), attention_rollout(weights), rtol=1e-6
  )


def test_maps_with_x64_and_strict_promotion():
  weights = random_maps(2, 1, 2, 5, 5)
  with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
    found = attention_rollout(weights), attention_distances(weights, (2, 2), patch_size=4.0)
  assert {array.dtype.name for array in found} == {"float32"}
