"""ImageNet-ReaL scores and class subsets, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.metrics.classification import ClassificationEvaluator, score_rankings
from vit_jax_zoo.tasks.classification import is_correct


def multi_hot(rows, num_classes):
  return np.array([[label in row for label in range(num_classes)] for row in rows])


def test_real_any_label_unlabelled_skipped():
  labels = multi_hot([{0, 3}, set(), {2}, {1, 2, 4}], 5)
  ranked = np.array([[3, 1, 0, 2, 4], [0, 1, 2, 3, 4], [1, 2, 0, 3, 4], [4, 0, 1, 2, 3]])
  scores = score_rankings(ranked, labels)
  assert scores == {"accuracy": pytest.approx(2 / 3), "images": 3, "classes": 5}
  evaluator = ClassificationEvaluator(5)  # the training evaluator uses the same rule
  weights, first = labels.astype(np.float32), ranked[:, :1]
  correct = np.asarray(is_correct(jnp.asarray(weights), jnp.asarray(first)))
  evaluator.add({"label": weights}, {"labels": first, "correct": correct, "loss": np.zeros(4)})
  result = evaluator.result()
  assert (result["accuracy"], result["images"]) == (pytest.approx(2 / 3), 3)


def test_top5_accuracy():
  labels = multi_hot([{5}, {6}, {0}], 7)
  ranked = np.array([[0, 1, 2, 3, 5, 4, 6], [0, 1, 2, 3, 5, 6, 4], [0, 1, 2, 3, 5, 4, 6]])
  scores = score_rankings(ranked, labels)
  assert scores["accuracy"] == pytest.approx(1 / 3)
  assert scores["top5_accuracy"] == pytest.approx(2 / 3)


def test_only_its_classes_drops_absent_classes():
  labels = multi_hot([{1}, {3}, {3}], 4)
  ranked = np.array([[0, 2, 1, 3], [2, 3, 0, 1], [0, 1, 3, 2]])
  assert score_rankings(ranked, labels)["accuracy"] == 0
  scores = score_rankings(ranked, labels, only_its_classes=True)
  assert scores == {"accuracy": pytest.approx(2 / 3), "images": 3, "classes": 2}


def test_subset_equals_argmax_of_its_logits():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(200, 30))
  classes = rng.permutation(30)[:8]
  truth = classes[rng.integers(0, 8, 200)]
  truth[:8] = classes
  labels = np.eye(30, dtype=bool)[truth]
  expected = classes[logits[:, classes].argmax(1)] == truth
  scores = score_rankings(np.argsort(-logits, axis=1), labels, only_its_classes=True)
  assert scores["accuracy"] == pytest.approx(expected.mean())
  assert scores["classes"] == 8
  top5 = np.argsort(-logits[:, classes], axis=1)[:, :5]
  assert scores["top5_accuracy"] == pytest.approx((classes[top5] == truth[:, None]).any(1).mean())


def test_no_labels_raise():
  with pytest.raises(ValueError, match="label: none in 2 images"):
    score_rankings(np.zeros((2, 3), int), np.zeros((2, 3), bool))
