"""Mean IoU by hand, for any batching."""

import pickle

import numpy as np
import pytest

from vit_jax_zoo.systems.fpt.task import SegmentationEvaluator


def batch(*rows, **more):
  return {"label_map": np.array(rows, np.uint8)[:, None], **more}


def score(pairs, num_classes=4, **fields):
  evaluator = SegmentationEvaluator(num_classes, **fields)
  for truth, predicted in pairs:
    evaluator.add(truth, predicted)
  return evaluator.result()


def test_scores_by_hand():
  """The IoU of each class is over the pixels of all images."""
  # Class 0: 2 right, 1 missed, 1 too many: 2/4. Class 1: 1 right, 1 missed, 1 too many: 1/3.
  truth, predicted = batch([0, 0, 0, 1, 1, 255]), batch([0, 0, 1, 1, 0, 3])
  scores = score([(truth, predicted)], per_class=True, class_names=("sky", "sea"))
  assert scores["iou/sky"] == pytest.approx(2 / 4)
  assert scores["iou/sea"] == pytest.approx(1 / 3)
  assert scores["miou"] == pytest.approx((2 / 4 + 1 / 3) / 2)
  assert scores["pixel_accuracy"] == pytest.approx(3 / 5)
  assert scores["mean_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
  assert "iou/2" not in scores  # neither in the ground truth nor predicted
  assert scores["images"] == 1


def test_class_without_ground_truth_scores_zero():
  """A predicted class without ground truth counts as 0 in "miou", not in "mean_accuracy"."""
  scores = score([(batch([0, 0, 0, 0]), batch([0, 0, 0, 2]))])
  assert scores["miou"] == pytest.approx((3 / 4 + 0) / 2)
  assert scores["mean_accuracy"] == pytest.approx(3 / 4)


def test_equals_sklearn_jaccard_score():
  from sklearn.metrics import jaccard_score

  rng = np.random.default_rng(0)
  truth, predicted = rng.integers(0, 4, (2, 5, 8, 9))
  scores = score([({"label_map": truth}, {"label_map": predicted})])
  expected = jaccard_score(truth.ravel(), predicted.ravel(), average="macro")
  assert scores["miou"] == pytest.approx(expected)


def test_independent_of_batches_padding_hosts():
  rng = np.random.default_rng(1)
  truth, predicted = rng.integers(0, 4, (2, 6, 5, 7))
  expected = score([({"label_map": truth}, {"label_map": predicted})])
  one, other = SegmentationEvaluator(4), SegmentationEvaluator(4)
  wide = rng.integers(0, 4, (4, 8, 9))
  wide[:3, :5, :7] = truth[:3]
  guess = rng.integers(0, 4, (4, 8, 9))
  guess[:3, :5, :7] = predicted[:3]
  sizes, mask = np.tile([5, 7], (4, 1)), np.array([True, True, True, False])
  one.add({"label_map": wide, "image_size": sizes, "mask": mask}, {"label_map": guess})
  for row in range(3, 6):
    other.add({"label_map": truth[row : row + 1]}, {"label_map": predicted[row : row + 1]})
  one.merge(pickle.loads(pickle.dumps(other)))
  assert one.result() == pytest.approx(expected)


def test_invalid_inputs_raise():
  """Labels out of range, different sizes, no pixel to score."""
  for truth, predicted, what in (
    ([0, 9], [0, 0], "true label 9"),
    ([0, 0], [0, 5], "predicted label 5"),
  ):
    with pytest.raises(ValueError, match=f"label_map: {what}") as error:
      score([(batch(truth), batch(predicted))])
    assert "\n" not in str(error.value)
  with pytest.raises(ValueError, match=r"label_map: .*predicted"):
    score([(batch([0, 0]), batch([0, 0, 0]))])
  with pytest.raises(ValueError, match="label_map"):
    score([(batch([255]), batch([0]))])
