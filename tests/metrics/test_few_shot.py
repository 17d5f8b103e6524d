"""Few-shot least squares against big_vision's own results and against scikit-learn."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from vit_jax_zoo.metrics.few_shot import (
  BIAS,
  RidgeClassifier,
  choose_shots,
  few_shot_accuracies,
  solve_ridge,
)


def test_the_reference_says_the_same(load_golden):
  config, inputs, outputs = load_golden("fewshot_lsr_a")
  labels = inputs["labels_train"]
  for seed in config["seeds"]:
    for shots in config["shots"]:
      expected = {
        key.partition("/")[2]: value
        for key, value in outputs.items()
        if key.startswith(f"seed{seed}_shot{shots}/")
      }
      rows = choose_shots(labels, shots, seed)
      np.testing.assert_array_equal(rows, expected["indices"])
      features = inputs["features_train"][rows]
      classifier = RidgeClassifier.fit(features, labels[rows], config["num_classes"])
      np.testing.assert_allclose(classifier.weights, expected["w_float64"], rtol=1e-5, atol=1e-9)
      scores = classifier.scores(inputs["features_test"])
      np.testing.assert_allclose(scores, expected["scores_float64"], rtol=1e-5, atol=1e-6)
  found = few_shot_accuracies(
    inputs["features_train"], labels, inputs["features_test"], inputs["labels_test"],
    shots=config["shots"], seeds=config["seeds"],
  )  # fmt: skip
  for shots, accuracies in found.items():
    theirs = [outputs[f"seed{s}_shot{shots}/accuracy_big_vision"] for s in config["seeds"]]
    np.testing.assert_allclose(accuracies, theirs, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(50, 7), (7, 50), (20, 20)])
def test_least_squares_as_scikit_learn_solves_them(rows, columns):
  rng = np.random.default_rng(rows)
  x, y = rng.normal(size=(rows, columns)), rng.normal(size=(rows, 3))
  expected = Ridge(alpha=4.0, fit_intercept=False).fit(x, y).coef_.T
  np.testing.assert_allclose(solve_ridge(x, y, 4.0), expected, atol=1e-10)


def test_the_bias_is_a_feature_like_any_other():
  rng = np.random.default_rng(0)
  features, labels = rng.normal(size=(30, 4)), rng.integers(0, 3, 30)
  classifier = RidgeClassifier.fit(features, labels, 3, 16.0)
  white = (features - features.mean(0)) / (features.std(0) + 1e-5)
  wide = np.concatenate([white, np.full((30, 1), BIAS)], axis=1)
  targets = 2.0 * np.eye(3)[labels] - 1
  expected = Ridge(alpha=16.0, fit_intercept=False).fit(wide, targets).predict(wide)
  np.testing.assert_allclose(classifier.scores(features), expected, atol=1e-8)


def test_fewer_shots_are_part_of_more():
  labels = np.array([0, 1, 2, 0, 1, 0, 0, 2, 0, 1])
  few, many = choose_shots(labels, 1, seed=3), choose_shots(labels, 3, seed=3)
  assert sorted(labels[few]) == [0, 1, 2]
  assert sorted(labels[many]) == [0, 0, 0, 1, 1, 1, 2, 2]  # there are but two of the last
  assert set(few) <= set(many)
  assert set(choose_shots(labels, 1, seed=4)) != set(few)
