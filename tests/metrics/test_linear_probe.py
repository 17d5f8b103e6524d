import numpy as np
import pytest

from vit_jax_zoo.metrics.feature_probes import Labelled, Linear


def clouds(rows, distance, seed):
  """Three classes with means `distance` standard deviations apart in two of five features."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, rows)
  means = distance * np.array([[0, 0], [1, 0], [0, 1]])
  features = rng.normal(0, 1, (rows, 5))
  features[:, :2] += means[labels]
  return features.astype(np.float32), labels


def labelled(rows, seed):
  good, labels = clouds(rows, 6, seed)
  noise = np.random.default_rng(seed + 100).normal(0, 1, (rows, 5)).astype(np.float32)
  return Labelled({"good": good, "noise": noise, "scaled": 1000 * good + 5}, labels)


def test_separable_classes_classified():
  found = Linear()(labelled(400, 0), labelled(300, 1))
  scores = {name: score.scores["accuracy"] for name, score in found.items()}
  assert scores["good"] > 0.97
  assert found["good"].validation > 0.95
  assert scores["noise"] < 0.45
  assert scores["scaled"] == pytest.approx(scores["good"], abs=0.005)


def test_strength_independent_of_test_labels():
  fit, test = labelled(200, 0), labelled(100, 1)
  shuffled = Labelled(test.features, np.random.default_rng(0).permutation(test.labels))
  one, other = Linear()(fit, test), Linear()(fit, shuffled)
  for name, score in one.items():
    assert score.scores["strength"] == other[name].scores["strength"]
    assert score.validation == other[name].validation


def test_too_few_examples_raise():
  few = Labelled({"x": np.zeros((4, 2), np.float32)}, np.zeros(4, int))
  with pytest.raises(ValueError, match="4 of 1 classes"):
    Linear()(few, few)
