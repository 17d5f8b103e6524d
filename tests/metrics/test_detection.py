"""COCO detection scores against pycocotools and by hand, for any batching."""

import contextlib
import io
import json
import pickle

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vit_jax_zoo.metrics.detection import DetectionEvaluator

CLASSES, TARGETS, QUERIES = 5, 7, 12


def make_split(seed=0, images=24):
  """One-image batches: ground truth, some crowds; close, distant and duplicate detections."""
  rng = np.random.default_rng(seed)
  split = []
  for index in range(images):
    size = rng.integers(80, 400, 2)
    count = int(rng.integers(0, TARGETS + 1))
    center = rng.uniform(0.25, 0.75, (TARGETS, 2))
    sides = rng.uniform(0.05, 0.5, (TARGETS, 2))
    labels = rng.integers(0, CLASSES - 1, TARGETS)  # the last class never occurs
    boxes = np.concatenate([center, sides], axis=1).astype(np.float32)
    source = rng.integers(0, TARGETS, QUERIES)
    jitter = rng.normal(scale=rng.choice([0.005, 0.03, 0.3], (QUERIES, 1)), size=(QUERIES, 4))
    found = boxes[source] + jitter
    scale = np.tile(size[::-1], 2)
    low, high = found[:, :2] - found[:, 2:] / 2, found[:, :2] + found[:, 2:] / 2
    right = rng.uniform(size=QUERIES) < 0.8
    pixels = (sides * size[::-1]).prod(axis=1)
    batch = {
      "image": np.zeros((1, 8, 8, 3), np.uint8),
      "image_id": np.array([1000 - index]),
      "original_size": size[None],
      "boxes_cxcywh": boxes[None],
      "labels": labels[None],
      "is_target": (np.arange(TARGETS) < count)[None],
      "is_crowd": (rng.uniform(size=TARGETS) < 0.15)[None],
      "area": (pixels * rng.uniform(0.5, 1, TARGETS))[None].astype(np.float32),
    }
    predictions = {
      "boxes_xyxy": (np.concatenate([low, high], axis=1) * scale)[None].astype(np.float32),
      "labels": np.where(right, labels[source], rng.integers(0, CLASSES, QUERIES))[None],
      "scores": rng.uniform(size=(1, QUERIES)).astype(np.float32),
    }
    split.append((batch, predictions))
  return split


def score(split, **fields):
  evaluator = DetectionEvaluator(CLASSES, **fields)
  for batch, predictions in split:
    evaluator.add(batch, predictions)
  return evaluator.result()


def coco_files(split):
  """Returns ground truth and detections in COCO's JSON form, independent of the evaluator."""
  truth = {"images": [], "annotations": [], "categories": [{"id": i} for i in range(CLASSES)]}
  found = []
  for batch, predictions in split:
    number, (height, width) = int(batch["image_id"][0]), batch["original_size"][0]
    truth["images"].append({"id": number, "height": int(height), "width": int(width)})
    for i in np.flatnonzero(batch["is_target"][0]):
      cx, cy, w, h = batch["boxes_cxcywh"][0, i].astype(np.float64)
      box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
      truth["annotations"].append(
        {
          "id": len(truth["annotations"]) + 1,
          "image_id": number,
          "category_id": int(batch["labels"][0, i]),
          "bbox": [float(x) for x in box],
          "area": float(batch["area"][0, i]),
          "iscrowd": int(batch["is_crowd"][0, i]),
        }
      )
    for (left, top, right, bottom), label, s in zip(
      predictions["boxes_xyxy"][0].astype(np.float64),
      predictions["labels"][0],
      predictions["scores"][0],
      strict=True,
    ):
      box = [float(left), float(top), float(right - left), float(bottom - top)]
      found.append({"image_id": number, "category_id": int(label), "bbox": box, "score": float(s)})
  return truth, found


def test_scores_equal_pycocotools(tmp_path):
  split = make_split()
  truth, found = coco_files(split)
  path = tmp_path / "truth.json"
  path.write_text(json.dumps(truth))
  with contextlib.redirect_stdout(io.StringIO()):
    reference = COCO(str(path))
    run = COCOeval(reference, reference.loadRes(found), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
  scores = score(split, per_class=True)
  names = ("", "50", "75", "_small", "_medium", "_large")
  expected = dict(zip([f"box_ap{name}" for name in names], run.stats[:6], strict=True))
  names = ("1", "10", "100", "_small", "_medium", "_large")
  expected |= dict(zip([f"box_ar{name}" for name in names], run.stats[6:], strict=True))
  for name, value in expected.items():
    assert scores[name] == pytest.approx(value, abs=1e-9), name
  of_class = run.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1))
  for label in range(CLASSES - 1):
    assert scores[f"box_ap/{label}"] == pytest.approx(of_class[label], abs=1e-9)
  assert f"box_ap/{CLASSES - 1}" not in scores
  assert 0.05 < scores["box_ap"] < scores["box_ap50"] < 1


def perfect(split):
  """Returns detections equal to the ground truth."""
  result = []
  for batch, _ in split:
    batch = {k: v for k, v in batch.items() if k not in ("is_crowd", "area")}
    scale = np.tile(batch["original_size"][:, ::-1], 2)[:, None]
    low = batch["boxes_cxcywh"][..., :2] - batch["boxes_cxcywh"][..., 2:] / 2
    high = batch["boxes_cxcywh"][..., :2] + batch["boxes_cxcywh"][..., 2:] / 2
    boxes = np.concatenate([low, high], axis=-1) * scale
    found = {"boxes_xyxy": boxes, "labels": batch["labels"], "scores": 1.0 * batch["is_target"]}
    result.append((batch, found))
  return result


def test_ground_truth_scores_one():
  scores = score(perfect(make_split()))
  assert scores["box_ap"] == pytest.approx(1, abs=1e-6)
  assert scores["box_ar100"] == pytest.approx(1)
  assert scores["images"] == 24


def test_independent_of_batches_padding_hosts():
  split = make_split()
  expected = score(split)
  blank = {k: np.zeros_like(v) for k, v in split[0][0].items()} | {"labels": np.full((1, 7), 99)}
  rows = [*split, (blank, split[0][1])]
  together = tuple({k: np.concatenate([r[i][k] for r in rows]) for k in rows[0][i]} for i in (0, 1))
  together[0]["mask"] = np.arange(len(rows)) < len(split)
  assert score([together]) == expected
  first, second = DetectionEvaluator(CLASSES), DetectionEvaluator(CLASSES)
  for index, (batch, predictions) in enumerate(reversed(split)):
    (first if index % 2 else second).add(batch, predictions)
  second.add(*split[3])  # a host's last batch may repeat an image
  first.merge(pickle.loads(pickle.dumps(second)))
  assert first.result() == expected


def test_images_without_ids_or_sizes():
  batch = {
    "image": np.zeros((2, 100, 200, 3), np.uint8),
    "boxes_cxcywh": np.tile(np.float32([0.5, 0.5, 0.4, 0.4]), (2, 1, 1)),
    "labels": np.array([[1], [2]]),
    "is_target": np.ones((2, 1), bool),
  }
  found = np.tile(np.float32([60, 30, 140, 70]), (2, 1, 1))
  predictions = {"boxes_xyxy": found, "labels": np.array([[1], [1]]), "scores": np.ones((2, 1))}
  scores = score([(batch, predictions)])
  # Class 1: a true positive, then a false positive with the same score. Class 2: no detection.
  assert scores["box_ap"] == pytest.approx(0.5)
  assert "box_ap_small" not in scores
  assert scores["box_ap_medium"] == pytest.approx(0.5)


def test_no_detections_score_zero():
  split = make_split(images=2)
  empty = {
    "boxes_xyxy": np.zeros((1, 0, 4)), "labels": np.zeros((1, 0), int), "scores": np.zeros((1, 0))
  }  # fmt: skip
  scores = score([(batch, empty) for batch, _ in split])
  assert scores["box_ap"] == scores["box_ar100"] == 0


def test_invalid_inputs_raise():
  split = make_split(images=1)
  with pytest.raises(ValueError, match="ground truth in 0"):
    DetectionEvaluator(CLASSES).result()
  crowds = {"is_crowd": np.ones((1, TARGETS), bool)}  # crowds alone do not count as ground truth
  with pytest.raises(ValueError, match="ground truth in 1"):
    score([(split[0][0] | crowds, split[0][1])])
  batch = split[0][0] | {"labels": np.full((1, TARGETS), 5), "is_target": np.ones((1, 7), bool)}
  with pytest.raises(ValueError, match="labels: 5"):
    DetectionEvaluator(CLASSES).add(batch, split[0][1])
