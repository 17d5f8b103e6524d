"""The SGD probe against scikit-learn's logistic regression."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vit_jax_zoo.metrics.feature_probes import LinearSgd, Rows


def clouds(rows, seed):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, rows)
  features = rng.normal(0, 1, (rows, 5)) + 1.5 * np.eye(5)[labels]
  return (100 + 7 * features).astype(np.float32), labels


def test_optimum_equals_logistic_regression():
  features, labels = clouds(200, 0)
  probe = LinearSgd(num_epochs=1500, batch_size=1000)
  (found, _), _ = probe.fit(Rows(features, labels), (1.0, 0.3), 3)
  scaled = StandardScaler().fit_transform(features)
  peer = LogisticRegression(C=np.inf, tol=1e-10, max_iter=5000).fit(scaled, labels)
  for weights in np.asarray(found):  # softmax is invariant to a constant: compares centred weights
    ours, theirs = weights - weights.mean(1, keepdims=True), peer.coef_.T
    np.testing.assert_allclose(ours, theirs - theirs.mean(1, keepdims=True), atol=2e-3)


def test_diverging_rate_does_not_affect_others():
  fit, test = Rows(*clouds(300, 0)), Rows(*clouds(200, 1))
  fit.features[:, 4] = 3.0  # a constant feature
  probe = LinearSgd(num_epochs=5, batch_size=32)
  both = probe.accuracies(fit, test, (1e30, 0.1))
  assert both[1] == probe.accuracies(fit, test, (0.1,))[0] > 0.7
  assert both[0] < both[1]
