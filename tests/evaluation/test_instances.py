"""Mask AP: by hand, against pycocotools, and what it refuses."""

import numpy as np
import pytest

from vit_jax_zoo.evaluation.instances import InstanceEvaluator

SIDE = 40


def scene(seed, count=3):
  """Objects that are discs in boxes, and finds that are nearly the same."""
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
  v, u = (np.mgrid[:28, :28] + 0.5) / 28 - 0.5
  disc = np.clip(0.5 + 20 * (0.25 - u**2 - v**2), 0, 1)
  shares = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)
  batch = {
    "image": np.zeros((1, SIDE, SIDE, 3), np.uint8),
    "boxes_cxcywh": shares[None] / SIDE,
    "labels": rng.integers(0, 2, (1, count)),
    "is_target": np.ones((1, count), bool),
    "masks": masks[None],
    "image_id": np.array([seed]),
  }
  predictions = {
    "boxes_xyxy": np.concatenate([boxes, np.zeros((1, 4))])[None],
    "labels": np.append(batch["labels"][0], 0)[None],
    "scores": np.append(rng.uniform(0.5, 1, count), 0)[None],
    "is_object": np.append(np.ones(count, bool), False)[None],
    "box_masks": np.broadcast_to(disc, (1, count + 1, 28, 28)).copy(),
  }
  return batch, predictions


def scored(scenes, **fields):
  evaluator = InstanceEvaluator(2, **fields)
  for batch, predictions in scenes:
    evaluator.add(batch, predictions)
  return evaluator


def test_right_boxes_with_right_and_with_wrong_masks():
  scenes = [scene(seed) for seed in range(5)]
  good = scored(scenes).result()
  assert good["mask_ap"] > 0.85
  assert good["mask_ap50"] == pytest.approx(1)
  assert good["box_ap"] == pytest.approx(1)
  for _, predictions in scenes:
    predictions["box_masks"][:, :, 14:] = 0  # half of each disc: an IoU of one half at best
  half = scored(scenes).result()
  assert half["mask_ap75"] == pytest.approx(0)
  assert half["box_ap"] == pytest.approx(1)


def test_masks_come_as_run_lengths_too_and_an_image_counts_once():
  from vit_jax_zoo.evaluation.instances import _encode

  scenes = [scene(seed) for seed in range(4)]
  expected = scored(scenes).result()
  for batch, _ in scenes:
    lines = b"".join(m["counts"].encode() + b"\n" for m in _encode(batch.pop("masks")[0]))
    batch["run_lengths"] = np.frombuffer(lines.ljust(2000, b"\0"), np.uint8)[None]
    batch["original_size"] = np.array([[SIDE, SIDE]])
  parts = [scored(scenes[:3]), scored(scenes[1:])]
  parts[0].merge(parts[1])
  assert parts[0].result() == expected


def test_it_agrees_with_pycocotools():
  import contextlib
  import io

  from pycocotools.coco import COCO
  from pycocotools.cocoeval import COCOeval

  scenes = [scene(seed) for seed in range(6)]
  rng = np.random.default_rng(9)
  for _, predictions in scenes:
    predictions["boxes_xyxy"] = predictions["boxes_xyxy"] + rng.normal(0, 1.5, (1, 4, 4))
  evaluator = scored(scenes)
  truth, found = evaluator._as_coco()
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


def test_masks_of_another_size_are_refused():
  batch, predictions = scene(0)
  batch["original_size"] = np.array([[80, 80]])
  with pytest.raises(
    ValueError, match=r"masks of 40x40 cannot be scored in an image of 80x80; set"
  ):
    scored([(batch, predictions)])
  del batch["masks"]
  with pytest.raises(ValueError, match="masks cannot be scored: the data has none"):
    scored([(batch, predictions)])
