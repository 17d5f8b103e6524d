"""The probe by gradient descent against scikit-learn's logistic regression."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vit_jax_zoo.metrics.linear_probe import SgdRecipe, fit_by_sgd


def clouds(rows, seed):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, rows)
  features = rng.normal(0, 1, (rows, 5)) + 1.5 * np.eye(5)[labels]
  return (100 + 7 * features).astype(np.float32), labels


def test_the_optimum_is_logistic_regression_s():
  features, labels = clouds(200, 0)
  recipe = SgdRecipe(rates=(1.0, 0.3), num_epochs=1500, batch_size=1000)
  found = fit_by_sgd(features, labels, 3, recipe)
  scaled = StandardScaler().fit_transform(features)
  peer = LogisticRegression(C=np.inf, tol=1e-10, max_iter=5000).fit(scaled, labels)
  for weights in np.asarray(found.weights):  # softmax has one weight too many: compare differences
    ours, theirs = weights - weights.mean(1, keepdims=True), peer.coef_.T
    np.testing.assert_allclose(ours, theirs - theirs.mean(1, keepdims=True), atol=2e-3)


def test_a_rate_that_is_too_high_does_no_harm_to_the_others():
  (features, labels), (test, test_labels) = clouds(300, 0), clouds(200, 1)
  features[:, 4] = 3.0  # a feature that never changes
  alone = fit_by_sgd(features, labels, 3, SgdRecipe(rates=(0.1,), num_epochs=5, batch_size=32))
  recipe = SgdRecipe(rates=(1e30, 0.1), num_epochs=5, batch_size=32)
  both = fit_by_sgd(features, labels, 3, recipe).accuracies(test, test_labels)
  assert both[1] == alone.accuracies(test, test_labels)[0] > 0.7
  assert both[0] < both[1]
