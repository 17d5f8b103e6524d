"""Nearest neighbours against scikit-learn."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from vit_jax_zoo.metrics import knn


def clouds(rows, seed):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 4, rows)
  return (rng.normal(0, 1, (rows, 6)) + 0.8 * np.eye(6)[labels]).astype(np.float32), labels


@pytest.mark.parametrize("temperature", [None, 0.07, 1.0])
def test_votes_as_scikit_learn_counts_them(temperature, monkeypatch):
  monkeypatch.setattr(knn, "_CHUNK", 1000)  # several chunks, the last one smaller
  (features, labels), (test, _) = clouds(150, 0), clouds(40, 1)
  found = knn.classify_by_neighbours(
    features, labels, test, neighbours=(1, 4, 15), temperature=temperature
  )
  for count, predicted in found.items():
    weights = "uniform" if temperature is None else lambda d: np.exp(-d / temperature)
    peer = KNeighborsClassifier(count, metric="cosine", algorithm="brute", weights=weights)
    np.testing.assert_array_equal(predicted, peer.fit(features, labels).predict(test))


def test_length_does_not_matter_and_few_images_all_vote():
  features = np.array([[1, 0], [0, 1], [0, 2]], np.float32)
  labels = np.array([1, 0, 0])
  near = np.array([[5, 1], [1, 9]], np.float32)
  found = knn.classify_by_neighbours(features, labels, near, neighbours=(1, 20))
  np.testing.assert_array_equal(found[1], [1, 0])
  np.testing.assert_array_equal(found[20], [1, 0])
  plain = knn.classify_by_neighbours(features, labels, near, neighbours=(20,), temperature=None)
  np.testing.assert_array_equal(plain[20], [0, 0])
