"""Mask AP by hand and against pycocotools; errors."""

import pickle

import numpy as np
import pytest

from vit_jax_zoo.metrics.detection import InstanceEvaluator, encode_masks

SIDE = 40


class MaskEvaluator(InstanceEvaluator):
  """Reads predicted `masks` [b q h w] of the original image."""

  def found_masks(self, batch, predictions, row, size):
    return encode_masks(predictions["masks"][row])


def scene(seed, count=3):
  """Discs in boxes, with detections that are nearly equal."""
  rng = np.random.default_rng(seed)
  low = rng.uniform(0, 18, (count, 2))
  boxes = np.concatenate([low, low + rng.uniform(10, 20, (count, 2))], axis=1)
  y, x = np.mgrid[:SIDE, :SIDE] + 0.5
  masks = np.stack(
    [
      ((x - (b[0] + b[2]) / 2) / (b[2] - b[0])) ** 2
      + ((y - (b[1] + b[3]) / 2) / (b[3] - b[1])) ** 2
      < 0.25
      for b in boxes
    ]
  )
  boxes_cxcywh = np.concatenate(
    [(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1
  )
  batch = {
    "image": np.zeros((1, SIDE, SIDE, 3), np.uint8),
    "boxes_cxcywh": boxes_cxcywh[None] / SIDE,
    "labels": rng.integers(0, 2, (1, count)),
    "is_target": np.ones((1, count), bool),
    "masks": masks[None],
    "image_id": np.array([seed]),
  }
  predictions = {
    "boxes_xyxy": np.concatenate([boxes, np.zeros((1, 4))])[None],
    "labels": np.append(batch["labels"][0], 0)[None],
    "scores": np.append(rng.uniform(0.5, 1, count), 0)[None],
    "masks": np.concatenate([masks, np.zeros((1, SIDE, SIDE), bool)])[None],
  }
  return batch, predictions


def scored(scenes):
  evaluator = MaskEvaluator(2)
  for batch, predictions in scenes:
    evaluator.add(batch, predictions)
  return evaluator


def test_correct_boxes_with_correct_and_wrong_masks():
  scenes = [scene(seed) for seed in range(5)]
  good = scored(scenes).result()
  assert good["mask_ap"] == pytest.approx(1)
  assert good["box_ap"] == pytest.approx(1)
  for batch, predictions in scenes:  # half of each disc: IoU at most 0.6
    middle = (batch["boxes_cxcywh"][0, :, 1] * SIDE).round().astype(int)
    for mask, row in zip(predictions["masks"][0], middle, strict=False):
      mask[row:] = False
  half = scored(scenes).result()
  assert half["mask_ap75"] == pytest.approx(0)
  assert half["box_ap"] == pytest.approx(1)


def test_run_length_masks_and_duplicate_images():
  scenes = [scene(seed) for seed in range(4)]
  expected = scored(scenes).result()
  for batch, _ in scenes:
    lines = b"".join(m["counts"].encode() + b"\n" for m in encode_masks(batch.pop("masks")[0]))
    batch["run_lengths"] = np.frombuffer(lines.ljust(2000, b"\0"), np.uint8)[None]
    batch["original_size"] = np.array([[SIDE, SIDE]])
  parts = [scored(scenes[:3]), scored(scenes[1:])]
  parts[0].merge(parts[1])
  assert parts[0].result() == expected


def test_scores_equal_pycocotools():
  import contextlib
  import io

  from pycocotools.coco import COCO
  from pycocotools.cocoeval import COCOeval

  scenes = [scene(seed) for seed in range(6)]
  rng = np.random.default_rng(9)
  for _, predictions in scenes:
    predictions["boxes_xyxy"] = predictions["boxes_xyxy"] + rng.normal(0, 1.5, (1, 4, 4))
    predictions["masks"] = np.roll(predictions["masks"], rng.integers(-2, 3, 2), (2, 3))
  evaluator = scored(scenes)
  truth, found = evaluator._as_coco("segm")
  with contextlib.redirect_stdout(io.StringIO()):
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    run = COCOeval(coco, coco.loadRes(found), "segm")
    run.evaluate()
    run.accumulate()
    run.summarize()
  scores = evaluator.result()
  assert 0.1 < scores["mask_ap"] < 0.9
  np.testing.assert_allclose(scores["mask_ap"], run.stats[0], atol=1e-9)
  np.testing.assert_allclose(scores["mask_ap75"], run.stats[2], atol=1e-9)


def test_mask_size_mismatch_raises():
  batch, predictions = scene(0)
  batch["original_size"] = np.array([[80, 80]])
  with pytest.raises(ValueError, match=r"40x40 .*80x80"):
    scored([(batch, predictions)])
  del batch["masks"]
  with pytest.raises(ValueError, match="masks: missing"):
    scored([(batch, predictions)])


def test_ground_truth_as_segment_map():
  scenes = [scene(seed, count=1) for seed in range(4)]
  for batch, _ in scenes:
    batch["segment_map"] = np.where(batch.pop("masks")[:, 0], 0, -1)
  assert scored(scenes).result()["mask_ap"] == pytest.approx(1)


def test_independent_of_batches_and_hosts():
  """Images are identified by their ids."""
  scenes = [scene(seed) for seed in range(6)]
  for _, predictions in scenes:
    predictions["scores"] = np.round(
      predictions["scores"], 1
    )  # ties, which are ordered by position
  expected = scored(scenes).result()
  one, other = scored(scenes[4:] + scenes[:1]), scored(scenes[3:0:-1])
  one.merge(pickle.loads(pickle.dumps(other)))
  assert one.result() == expected
  keys = scenes[0][0].keys(), scenes[0][1].keys()
  together = tuple(
    {key: np.concatenate([scene[i][key] for scene in scenes]) for key in keys[i]} for i in (0, 1)
  )
  assert scored([together]).result() == expected
