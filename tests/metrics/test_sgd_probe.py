"""The probe by gradient descent against scikit-learn's logistic regression."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vit_jax_zoo.metrics.feature_probes import LinearSgd, Rows


def clouds(rows, seed):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, rows)
  features = rng.normal(0, 1, (rows, 5)) + 1.5 * np.eye(5)[labels]
  return (100 + 7 * features).astype(np.float32), labels


def test_the_optimum_is_logistic_regression_s():
  features, labels = clouds(200, 0)
  probe = LinearSgd(num_epochs=1500, batch_size=1000)
  (found, _), _ = probe.fit(Rows(features, labels), (1.0, 0.3), 3)
  scaled = StandardScaler().fit_transform(features)
  peer = LogisticRegression(C=np.inf, tol=1e-10, max_iter=5000).fit(scaled, labels)
  for weights in np.asarray(found):  # softmax has one weight too many: compare differences
    ours, theirs = weights - weights.mean(1, keepdims=True), peer.coef_.T
    np.testing.assert_allclose(ours, theirs - theirs.mean(1, keepdims=True), atol=2e-3)


def test_a_rate_that_is_too_high_does_no_harm_to_the_others():
  fit, test = Rows(*clouds(300, 0)), Rows(*clouds(200, 1))
  fit.features[:, 4] = 3.0  # a feature that never changes
  probe = LinearSgd(num_epochs=5, batch_size=32)
  both = probe.accuracies(fit, test, (1e30, 0.1))
  assert both[1] == probe.accuracies(fit, test, (0.1,))[0] > 0.7
  assert both[0] < both[1]
