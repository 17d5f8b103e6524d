"""Mask AP by hand and against pycocotools; errors."""

import pickle

import numpy as np
import pytest

from vit_jax_zoo.metrics.detection import InstanceEvaluator, original_masks

SIDE = 40


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
  v, u = (np.mgrid[:28, :28] + 0.5) / 28 - 0.5
  disc = np.clip(0.5 + 20 * (0.25 - u**2 - v**2), 0, 1)
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
    "is_object": np.append(np.ones(count, bool), False)[None],
    "box_masks": np.broadcast_to(disc, (1, count + 1, 28, 28)).copy(),
  }
  return batch, predictions


def scored(scenes, **fields):
  evaluator = InstanceEvaluator(2, **fields)
  for batch, predictions in scenes:
    evaluator.add(batch, predictions)
  return evaluator


def test_correct_boxes_with_correct_and_wrong_masks():
  scenes = [scene(seed) for seed in range(5)]
  good = scored(scenes).result()
  assert good["mask_ap"] > 0.85
  assert good["mask_ap50"] == pytest.approx(1)
  assert good["box_ap"] == pytest.approx(1)
  for _, predictions in scenes:
    predictions["box_masks"][:, :, 14:] = 0  # half of each disc: IoU at most 0.5
  half = scored(scenes).result()
  assert half["mask_ap75"] == pytest.approx(0)
  assert half["box_ap"] == pytest.approx(1)


def test_run_length_masks_and_duplicate_images():
  from vit_jax_zoo.metrics.detection import encode_masks

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


@pytest.mark.parametrize("row", [0, 1])
def test_query_masks_golden(load_golden, row):
  """From a query's mask logits to pixels of the original image."""
  config, _, outputs = load_golden("detr_panoptic_a")
  size = tuple(config["orig_target_sizes"][row])
  batch = {"image": np.zeros((2, 96, 128, 3), np.uint8), "image_size": np.array(config["sizes"])}
  found = original_masks(batch, {"mask_logits": outputs["pred_masks"]}, row, size)
  expected = np.unpackbits(outputs[f"post_masks_{row}"], axis=-1)[..., : size[1]]
  np.testing.assert_array_equal(np.stack(list(found)), expected.astype(bool))


def as_query_masks(scenes):
  """Returns the same detections as mask logits of the whole image, like DETR's."""
  result = []
  for batch, predictions in scenes:
    masks = np.concatenate([batch["masks"][0], np.zeros((1, SIDE, SIDE), bool)])
    found = {key: value for key, value in predictions.items() if key != "box_masks"}
    result.append((batch, found | {"mask_logits": np.where(masks, 4.0, -4.0)[None]}))
  return result


def test_true_query_masks_score_one():
  """Ground truth as masks, or as a segment map."""
  scenes = as_query_masks([scene(seed, count=1) for seed in range(4)])
  assert scored(scenes).result()["mask_ap"] == pytest.approx(1)
  for batch, _ in scenes:
    batch["segment_map"] = np.where(batch.pop("masks")[:, 0], 0, -1)
  assert scored(scenes).result()["mask_ap"] == pytest.approx(1)


def test_masks_below_excludes_stuff():
  """Wrong masks of stuff classes do not change the score of things."""
  scenes = as_query_masks([scene(seed) for seed in range(6)])
  for batch, predictions in scenes:
    predictions["mask_logits"][0, :-1][batch["labels"][0] == 1] = -4.0
  assert scored(scenes).result()["mask_ap"] == pytest.approx(0.5)
  assert scored(scenes, masks_below=1).result()["mask_ap"] == pytest.approx(1)


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
