"""Majority vote over views."""

import collections

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax_zoo.metrics.feature_probes import majority_vote


def test_majority_label():
  labels = jnp.array([[3, 1, 0], [1, 1, 2], [3, 1, 2], [2, 0, 2], [3, 1, 5]])
  np.testing.assert_array_equal(majority_vote(labels, jax.random.key(0)), [3, 1, 2])
  np.testing.assert_array_equal(majority_vote(labels[:1], jax.random.key(0)), labels[0])


def test_ties_broken_uniformly():
  column = jnp.array([4, 4, 7, 7, 2])  # in 2000 images
  found = majority_vote(jnp.tile(column[:, None], (1, 2000)), jax.random.key(1))
  counts = collections.Counter(np.asarray(found).tolist())
  assert set(counts) == {4, 7}
  assert 900 < counts[4] < 1100
