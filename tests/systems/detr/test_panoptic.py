"""Segments from masks like the official code; panoptic quality by hand."""

import pickle

import numpy as np
import pytest

from vit_jax_zoo.systems.detr.panoptic import (
  VOID,
  PanopticEvaluator,
  QueryMaskEvaluator,
  Segmentation,
  found_segments,
  original_masks,
)

STUFF_FROM = 5  # of the fixture


def segment(logits, labels, stuff_from, *, padded_size, image_size, size):
  """Returns the segments of queries with these mask logits and labels."""
  batch = {"image": np.zeros((1, *padded_size, 3)), "image_size": [image_size]}
  predictions = {"mask_logits": logits, "labels": labels, "scores": np.ones(len(labels))}
  predictions = {k: v[None] for k, v in predictions.items()} | {"is_object": [labels >= 0]}
  return found_segments(batch | {"original_size": [size]}, predictions, 0, stuff_from, 0.5)


def softmax(logits):
  p = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return p / p.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("case", ["pan", "pan_same"])
@pytest.mark.parametrize("row", range(4))
def test_segments_golden(load_golden, case, row):
  config, inputs, outputs = load_golden("detr_fn_a")
  p = softmax(inputs["pan_logits"][row].astype(np.float64))
  scores, labels = p.max(axis=-1), p.argmax(axis=-1)
  sure = (labels != config["panoptic"]["num_classes"]) & (scores > 0.85)
  expected = outputs[f"{case}_ids_{row}"]
  processed = tuple(int(x) for x in inputs["pan_processed_sizes"][row])
  result = segment(
    inputs["pan_masks"][row][sure],
    labels[sure],
    STUFF_FROM,
    padded_size=processed,
    image_size=processed,
    size=expected.shape,
  )
  segments = config["panoptic"]["segments"][case][row]
  if not segments:
    assert np.all(result.segment_map == VOID)
    return
  np.testing.assert_array_equal(result.segment_map, expected)
  assert result.labels.tolist() == [s["category_id"] for s in segments]
  assert [np.sum(result.segment_map == s["id"]) for s in segments] == [s["area"] for s in segments]


def test_padding_removed():
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(3, 10, 12)).astype(np.float32), np.array([0, 1, 2])
  whole = segment(logits, labels, 9, padded_size=(40, 48), image_size=(40, 48), size=(40, 48))
  part = segment(logits, labels, 9, padded_size=(40, 48), image_size=(30, 20), size=(30, 20))
  np.testing.assert_array_equal(part.segment_map, whole.segment_map[:30, :20])


@pytest.mark.parametrize(("width", "found"), [(4, []), (5, [3])])
def test_small_segments_removed(width, found):
  """As in the official code: five pixels are enough, four are not."""
  sizes = dict.fromkeys(("padded_size", "image_size", "size"), (1, width))
  result = segment(np.zeros((1, 1, 2), np.float32), np.array([3]), 9, **sizes)
  assert result.labels.tolist() == found
  assert (result.segment_map == (0 if found else VOID)).all()


def rows(*values):
  """Returns a segment map of one row."""
  return np.array([values])


def quality(*pairs, num_classes=4, stuff_from=2):
  evaluator = PanopticEvaluator(num_classes, stuff_from=stuff_from)
  for truth, predicted in pairs:
    evaluator.count(truth, predicted)
  return evaluator.panoptic_scores()


def test_quality_by_hand():
  # Class 0: IoU 3/4. Class 1: 1 of 3 pixels, so a false negative and a false positive. Class 2:
  # exact.
  truth = Segmentation(rows(0, 0, 0, 1, 1, 1, 2, 2, VOID), np.array([0, 1, 2]))
  predicted = Segmentation(rows(0, 0, 0, 0, 1, VOID, 2, 2, 2), np.array([0, 1, 2]))
  scores = quality((truth, predicted))
  assert scores["pq_things"] == pytest.approx((0.75 + 0) / 2)
  assert scores["sq_things"] == pytest.approx((0.75 + 0) / 2)
  assert scores["rq_things"] == pytest.approx(0.5)
  assert scores["pq_stuff"] == scores["sq_stuff"] == scores["rq_stuff"] == 1
  assert scores["pq"] == pytest.approx((0.75 + 0 + 1) / 3)


def test_iou_of_half_not_matched():
  truth = Segmentation(rows(0, 0, VOID), np.array([0]))
  predicted = Segmentation(rows(0, VOID, VOID), np.array([0]))
  assert quality((truth, predicted))["pq"] == 0


def test_wrong_class_false_negative_and_false_positive():
  truth = Segmentation(rows(0, 0, 0), np.array([0]))
  predicted = Segmentation(rows(0, 0, 0), np.array([1]))
  assert quality((truth, predicted)) == {
    "pq": 0, "sq": 0, "rq": 0, "pq_things": 0, "sq_things": 0, "rq_things": 0
  }  # fmt: skip


def test_crowds_and_void_not_penalised():
  right = Segmentation(rows(0, 0, 0, 0, 0, 0), np.array([0]))
  crowd = Segmentation(rows(1, 1, 1, 0, 0, VOID), np.array([0, 1]), np.array([False, True]))
  # Segment 0: most of it is in a crowd of its class; segment 1 matches the object.
  predicted = Segmentation(rows(0, 0, 0, 1, 1, 1), np.array([1, 0]))
  assert quality((right, right), (crowd, predicted))["pq"] == 1
  other = Segmentation(rows(0, 0, 0, 1, 1, 1), np.array([0, 0]))  # a crowd of another class
  assert quality((right, right), (crowd, other))["pq"] == pytest.approx(2 / 2.5)
  in_void = Segmentation(rows(VOID, VOID, 1, 1, 1, 0), np.array([0, 1]))
  truth = Segmentation(rows(VOID, VOID, 0, 0, 0, VOID), np.array([1]))
  assert quality((truth, in_void))["pq"] == 1


def make_images(count=6, classes=4):
  """One-image batches of 10 x 12 pixels with partly correct masks."""
  rng = np.random.default_rng(1)
  images = []
  for number in range(count):
    coarse = rng.integers(0, 3, (2, 3))
    truth = np.kron(coarse, np.ones((5, 4), int))
    logits = 4.0 * (truth[None] == np.arange(3)[:, None, None]) + rng.normal(size=(3, 10, 12))
    labels = rng.permutation(classes)[:3]
    boxes = np.tile(np.float32([0.5, 0.5, 0.4, 0.4]), (1, 3, 1))
    batch = {
      "image": np.zeros((1, 10, 12, 3), np.uint8),
      "image_id": np.array([number]),
      "boxes_cxcywh": boxes,
      "labels": labels[None],
      "is_target": np.ones((1, 3), bool),
      "segment_map": truth[None],
    }
    predictions = {
      "boxes_xyxy": boxes * 10,
      "labels": labels[None],
      "scores": np.float32([[0.99, 0.9, 0.8]]),
      "is_object": np.ones((1, 3), bool),
      "mask_logits": logits[None].astype(np.float32),
    }
    images.append((batch, predictions))
  return images


def evaluate(images, **fields):
  evaluator = PanopticEvaluator(4, stuff_from=2, **fields)
  for batch, predictions in images:
    evaluator.add(batch, predictions)
  return evaluator


def test_evaluator_batches_hosts_threshold():
  images = make_images()
  expected = evaluate(images).result()
  assert 0 < expected["pq"] < 1
  assert "box_ap" in expected
  rows = [*images, images[0]]
  together = tuple({k: np.concatenate([r[i][k] for r in rows]) for k in rows[0][i]} for i in (0, 1))
  together[0]["mask"] = np.arange(7) < 6
  assert evaluate([together]).result() == pytest.approx(expected)
  first, second = evaluate(images[:2]), evaluate(images[2:] + images[2:3])
  first.merge(pickle.loads(pickle.dumps(second)))
  assert first.result() == pytest.approx(expected)
  assert evaluate(images, score_threshold=0.5).result()["pq"] > expected["pq"]


@pytest.mark.parametrize("row", [0, 1])
def test_query_masks_golden(load_golden, row):
  """From a query's mask logits to pixels of the original image."""
  config, _, outputs = load_golden("detr_panoptic_a")
  size = tuple(config["orig_target_sizes"][row])
  batch = {"image": np.zeros((2, 96, 128, 3), np.uint8), "image_size": np.array(config["sizes"])}
  found = original_masks(batch, {"mask_logits": outputs["pred_masks"]}, row, size)
  expected = np.unpackbits(outputs[f"post_masks_{row}"], axis=-1)[..., : size[1]]
  np.testing.assert_array_equal(np.stack(list(found)), expected.astype(bool))


def test_masks_of_stuff_do_not_count():
  images = make_images()
  expected = evaluate(images).result()["mask_ap"]
  for _, predictions in images:
    is_stuff = predictions["labels"] >= 2
    assert is_stuff.any()
    predictions["mask_logits"][is_stuff] = -4.0
  assert evaluate(images).result()["mask_ap"] == expected
  every = QueryMaskEvaluator(4)
  for batch, predictions in images:
    every.add(batch, predictions)
  assert every.result()["mask_ap"] < expected
