"""k-NN against scikit-learn."""

import numpy as np
import pytest
import sklearn
from sklearn.neighbors import KNeighborsClassifier

from vit_jax_zoo.metrics.feature_probes import NearestNeighbours, Rows


def clouds(rows, seed):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 4, rows)
  return (rng.normal(0, 1, (rows, 6)) + 0.8 * np.eye(6)[labels]).astype(np.float32), labels


@pytest.mark.parametrize("temperature", [None, 0.07, 1.0])
def test_votes_equal_scikit_learn(temperature):
  (features, labels), (test, _) = clouds(150, 0), clouds(40, 1)
  probe = NearestNeighbours(neighbours=(1, 4, 15), temperature=temperature)
  with sklearn.config_context(working_memory=0.01):  # several chunks, the last one smaller
    found = probe.classify(Rows(features, labels), Rows(test, labels))
  for count, predicted in found:
    weights = "uniform" if temperature is None else lambda d: np.exp(-d / temperature)
    peer = KNeighborsClassifier(count, metric="cosine", algorithm="brute", weights=weights)
    np.testing.assert_array_equal(predicted, peer.fit(features, labels).predict(test))


def test_cosine_distance_and_few_neighbours():
  fit = Rows(np.array([[1, 0], [0, 1], [0, 2]], np.float32), np.array([1, 0, 0]))
  test = Rows(np.array([[5, 1], [1, 9]], np.float32), np.zeros(2, int))
  found = dict(NearestNeighbours(neighbours=(1, 20)).classify(fit, test))
  np.testing.assert_array_equal(found[1], [1, 0])
  np.testing.assert_array_equal(found[20], [1, 0])
  plain = dict(NearestNeighbours(neighbours=(20,), temperature=None).classify(fit, test))
  np.testing.assert_array_equal(plain[20], [0, 0])
