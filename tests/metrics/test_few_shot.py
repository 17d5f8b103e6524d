"""Few-shot least squares against big_vision's results and scikit-learn."""

import numpy as np
from sklearn.linear_model import Ridge

from vit_jax_zoo.metrics.feature_probes import BIAS, FewShot, Rows, choose_shots, ridge_scores


def test_equals_big_vision(load_golden):
  config, inputs, outputs = load_golden("fewshot_lsr_a")
  train = Rows(inputs["features_train"], inputs["labels_train"])
  test = Rows(inputs["features_test"], inputs["labels_test"])
  for seed in config["seeds"]:
    probe = FewShot(shots=tuple(config["shots"]), seeds=(seed,))
    accuracies = probe.score(train, test)
    for shots in config["shots"]:
      expected = {
        key.partition("/")[2]: value
        for key, value in outputs.items()
        if key.startswith(f"seed{seed}_shot{shots}/")
      }
      rows = choose_shots(train.labels, shots, seed)
      np.testing.assert_array_equal(rows, expected["indices"])
      scores = ridge_scores(train[rows], test.features, config["num_classes"], probe.l2)
      np.testing.assert_allclose(scores, expected["scores_float64"], rtol=1e-5, atol=1e-6)
      theirs = expected["accuracy_big_vision"]
      np.testing.assert_allclose(accuracies[f"{shots}_shot"], theirs, atol=1e-6)


def test_bias_regularised_like_features():
  rng = np.random.default_rng(0)
  features, labels = rng.normal(size=(30, 4)), rng.integers(0, 3, 30)
  white = (features - features.mean(0)) / (features.std(0) + 1e-5)
  wide = np.concatenate([white, np.full((30, 1), BIAS)], axis=1)
  targets = 2.0 * np.eye(3)[labels] - 1
  expected = Ridge(alpha=16.0, fit_intercept=False, solver="svd").fit(wide, targets).predict(wide)
  found = ridge_scores(Rows(features, labels), features, 3, 16.0)
  np.testing.assert_allclose(found, expected, atol=1e-8)


def test_fewer_shots_subset_of_more():
  labels = np.array([0, 1, 2, 0, 1, 0, 0, 2, 0, 1])
  few, many = choose_shots(labels, 1, seed=3), choose_shots(labels, 3, seed=3)
  assert sorted(labels[few]) == [0, 1, 2]
  assert sorted(labels[many]) == [0, 0, 0, 1, 1, 1, 2, 2]  # the last class has only two examples
  assert set(few) <= set(many)
  assert set(choose_shots(labels, 1, seed=4)) != set(few)
