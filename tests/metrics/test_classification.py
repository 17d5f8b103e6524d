"""Classification metrics: exact, mergeable, picklable, missing labels."""

import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.metrics.classification import ClassificationEvaluator
from vit_jax_zoo.tasks.classification import is_correct


def ranked(rng, rows, classes, ranks=5):
  return np.stack([rng.permutation(classes)[:ranks] for _ in range(rows)]).astype(np.int32)


@pytest.fixture
def examples():
  rng = np.random.default_rng(3)
  batch = {"label": rng.integers(0, 8, 40).astype(np.int32), "mask": rng.random(40) < 0.8}
  labels = ranked(rng, 40, 8)
  correct = labels == batch["label"][:, None]
  loss = rng.random(40).astype(np.float32)
  return batch, {"labels": labels, "correct": correct, "loss": loss}


def rows(tree, start, stop):
  return {name: value[start:stop] for name, value in tree.items()}


def test_scores_by_hand():
  evaluator = ClassificationEvaluator(4, per_class=True, class_names=["a", "b", "c", "d"])
  batch = {"label": np.array([0, 0, 1, 3]), "mask": np.array([True, True, True, False])}
  labels = np.array([[0, 1], [1, 0], [2, 3], [3, 0]])
  correct = labels == batch["label"][:, None]
  loss = np.array([1.0, 2.0, 6.0, 99.0])
  evaluator.add(batch, {"labels": labels, "correct": correct, "loss": loss})
  assert evaluator.result() == {
    "accuracy": 1 / 3,
    "top2_accuracy": 2 / 3,
    "loss": 3.0,
    "images": 3.0,
    "mean_class_accuracy": 0.25,
    "accuracy/a": 0.5,
    "accuracy/b": 0.0,
  }
  expected = np.zeros((4, 4), int)
  expected[0, 0] = expected[0, 1] = expected[1, 2] = 1
  np.testing.assert_array_equal(evaluator.confusion(), expected)


@pytest.mark.parametrize("per_class", [False, True])
def test_merged_parts_equal_whole(examples, per_class):
  batch, predictions = examples
  whole = ClassificationEvaluator(8, per_class=per_class)
  whole.add(batch, predictions)
  merged = ClassificationEvaluator(8, per_class=per_class)
  for start, stop in ((0, 7), (7, 7), (7, 30), (30, 40)):
    part = ClassificationEvaluator(8, per_class=per_class)
    part.add(rows(batch, start, stop), rows(predictions, start, stop))
    merged.merge(pickle.loads(pickle.dumps(part)))
  merged.merge(ClassificationEvaluator(8, per_class=per_class))
  left, right = whole.result(), merged.result()
  assert left.pop("loss") == pytest.approx(right.pop("loss"), rel=1e-14)
  assert left == right
  np.testing.assert_array_equal(whole.confusion(), merged.confusion())


def test_padding_not_counted(examples):
  batch, predictions = examples
  whole, kept = ClassificationEvaluator(8), ClassificationEvaluator(8)
  whole.add(batch, predictions)
  mask = batch["mask"]
  kept.add({"label": batch["label"][mask]}, {k: v[mask] for k, v in predictions.items()})
  assert whole.result() == kept.result()
  assert whole.result()["images"] == mask.sum() < 40


def test_multilabel_accuracy_drops_unlabelled_rows():
  labels = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], np.float32)
  predictions = {"labels": np.array([[2], [0], [2]]), "loss": np.array([1.0, 50.0, 3.0])}
  predictions["correct"] = np.array([[True], [False], [False]])
  evaluator = ClassificationEvaluator(3, per_class=True)
  evaluator.add({"label": labels}, predictions)
  scores = evaluator.result()
  assert (scores["accuracy"], scores["images"], scores["loss"]) == (0.5, 2, 2.0)
  assert scores["accuracy/2"] == 1.0
  assert scores["accuracy/0"] == 0.0
  assert "top1_accuracy" not in scores


def test_is_correct_mixed_labels_argmax():
  labels = np.array([[0.3, 0.7, 0.0]], np.float32)
  hits = is_correct(jnp.asarray(labels), jnp.array([[1, 0, 2]]))
  np.testing.assert_array_equal(hits, [[True, False, False]])


@pytest.mark.parametrize(("label", "shown"), [(8, "8"), (-1, "-1")])
def test_label_out_of_range_raises(examples, label, shown):
  batch, predictions = examples
  batch = {"label": batch["label"].copy()}
  batch["label"][5] = label
  with pytest.raises(ValueError, match=rf"label: {shown}\b"):
    ClassificationEvaluator(8).add(batch, predictions)
  masked = batch | {"mask": np.arange(40) != 5}
  ClassificationEvaluator(8).add(masked, predictions)


def test_invalid_label_shape_and_no_labels_raise(examples):
  predictions = examples[1]
  with pytest.raises(ValueError, match="num_classes=8"):
    ClassificationEvaluator(8).add({"label": np.zeros((40, 3))}, predictions)
  with pytest.raises(ValueError, match="label: "):
    ClassificationEvaluator(8).result()
