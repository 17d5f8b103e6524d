"""Pasting box masks into images."""

import cv2
import numpy as np
import pytest

from vit_jax_zoo.systems.rcnn.masks import BoxMaskEvaluator, draw_masks, paste_masks


def smooth_masks(count, side, seed=0):
  noise = np.random.default_rng(seed).random((count, side // 2 + 1, side // 2 + 1))
  return np.stack([cv2.resize(0.2 + 0.8 * m, (side, side)) for m in noise])


def paste_by_hand(mask, box, size):
  """Bilinear interpolation of the mask at each pixel's centre, zero outside."""
  side = len(mask)
  result = np.zeros(size)
  for y in range(size[0]):
    for x in range(size[1]):
      v = (y + 0.5 - box[1]) / (box[3] - box[1]) * side - 0.5
      u = (x + 0.5 - box[0]) / (box[2] - box[0]) * side - 0.5
      for i in (int(np.floor(v)), int(np.floor(v)) + 1):
        for j in (int(np.floor(u)), int(np.floor(u)) + 1):
          if 0 <= i < side and 0 <= j < side:
            result[y, x] += (1 - abs(v - i)) * (1 - abs(u - j)) * mask[i, j]
  return result


BOXES = np.array(
  [
    [3.2, 4.7, 25.1, 20.3],
    [-6, -3, 12, 9],  # partly outside
    [0, 0, 40, 30],  # the whole image
    [20.2, 10.1, 21.9, 11.3],  # smaller than the mask
    [10, 10, 2000, 2000],
  ]
)


def test_exact_equals_bilinear():
  masks = smooth_masks(len(BOXES), 7)
  pasted = paste_masks(masks, BOXES, (30, 40))
  for mask, box, got in zip(masks, BOXES, pasted, strict=True):
    soft = paste_by_hand(mask, box, (30, 40))
    clear = np.abs(soft - 0.5) > 1e-9
    np.testing.assert_array_equal(got[clear], (soft >= 0.5)[clear])
  assert pasted.any(axis=(1, 2)).sum() >= 3
  assert 0.1 < pasted.mean() < 0.9


def detectron(mask, box, size):
  """Detectron's segm_results: pads, enlarges, truncates, resizes with OpenCV."""
  side = len(mask) + 2
  left, top, right, bottom = box
  half_w, half_h = (right - left) * 0.5 * side / len(mask), (bottom - top) * 0.5 * side / len(mask)
  x, y = (right + left) * 0.5, (bottom + top) * 0.5
  box = np.array([x - half_w, y - half_h, x + half_w, y + half_h]).astype(np.int32)
  width, height = np.maximum(box[2:] - box[:2] + 1, 1)
  resized = cv2.resize(np.pad(mask, 1).astype(np.float32), (int(width), int(height))) > 0.5
  canvas = np.zeros(size, bool)
  x0, x1 = max(box[0], 0), min(box[2] + 1, size[1])
  y0, y1 = max(box[1], 0), min(box[3] + 1, size[0])
  canvas[y0:y1, x0:x1] = resized[y0 - box[1] : y1 - box[1], x0 - box[0] : x1 - box[0]]
  return canvas


@pytest.mark.parametrize(("convention", "beyond"), [("detectron", 1), ("torchvision", 0)])
def test_detectron_and_torchvision_rounding(convention, beyond):
  masks = smooth_masks(len(BOXES), 14, seed=1)
  boxes = BOXES + np.array([0, 0, beyond, beyond])
  pasted = paste_masks(masks, boxes, (30, 40), convention=convention)
  for mask, box, got in zip(masks, BOXES, pasted, strict=True):
    expected = detectron(mask, box, (30, 40))
    assert (got != expected).mean() < 0.002  # OpenCV's rounding at the threshold
  assert pasted.any(axis=(1, 2)).sum() >= 3


@pytest.mark.parametrize("convention", ["exact", "detectron"])
def test_boxes_outside_or_nonfinite_empty(convention):
  boxes = np.array(
    [[100, 100, 120, 120], [-50, -50, -20, -20], [np.nan, 0, 5, 5], [0, np.inf, 5, 5]]
  )
  pasted = paste_masks(np.ones((4, 5, 5)), boxes, (30, 40), convention=convention)
  assert not pasted.any()
  assert paste_masks(np.ones((0, 5, 5)), np.zeros((0, 4)), (3, 4)).shape == (0, 3, 4)


def test_box_without_area_empty():
  boxes = np.array([[5.0, 5, 5, 9], [9, 9, 4, 4]])
  assert not paste_masks(np.ones((2, 5, 5)), boxes, (30, 40)).any()


def test_full_mask_fills_box():
  box = np.array([[4.0, 6, 24, 26]])
  pasted = paste_masks(np.ones((1, 28, 28)), box, (30, 40))[0]
  expected = np.zeros((30, 40), bool)
  expected[6:26, 4:24] = True
  np.testing.assert_array_equal(pasted, expected)


def test_masks_of_ground_truth_and_detections():
  masks = np.zeros((2, 3, 32, 32), bool)
  masks[:, 0, 4:12, 4:12] = masks[:, 1, 16:28, 8:30] = True
  batch = {
    "image": np.full((2, 32, 32, 3), 90, np.uint8),
    "image_size": np.array([[32, 32], [28, 30]]),
    "original_size": np.array([[64, 64], [56, 60]]),
    "labels": np.array([[1, 2, 0]] * 2),
    "is_target": np.array([[True, True, False]] * 2),
    "masks": masks,
    "mask": np.array([True, False]),
  }
  predictions = {
    "scores": np.array([[0.9, 0.6, 0.0]] * 2),
    "labels": np.array([[1, 2, 0]] * 2),
    "is_object": np.array([[True, True, False]] * 2),
    "boxes_xyxy": np.tile(np.array([[8.0, 8, 24, 24], [16, 32, 60, 56], [0, 0, 0, 0]]), (2, 1, 1)),
    "box_masks": np.ones((2, 3, 14, 14)),
  }
  figure = draw_masks(batch, predictions, ("a", "b"), threshold=0.7)
  titles = [ax.get_title(loc="left") for ax in figure.axes]
  assert titles == ["truth: 2", "1 predicted at 70% or more"]
  assert [text.get_text() for text in figure.axes[1].texts] == ["b 90%"]
  painted = figure.axes[1].get_images()[0].get_array()
  changed = np.abs(painted - 90 / 255).max(axis=2) > 0.01
  np.testing.assert_array_equal(changed, masks[0, 0])
  figure.canvas.draw()


def test_evaluator_pastes_masks_and_skips_padding():
  """A disc in each box, and a padding row with a box and a mask that would be wrong."""
  v, u = (np.mgrid[:28, :28] + 0.5) / 28 - 0.5
  disc = np.clip(0.5 + 20 * (0.25 - u**2 - v**2), 0, 1)
  boxes = np.array([[4.0, 6, 20, 22], [18, 10, 36, 34], [0, 0, 0, 0]])
  y, x = np.mgrid[:40, :40] + 0.5
  centers, sides = (boxes[:2, :2] + boxes[:2, 2:]) / 2, boxes[:2, 2:] - boxes[:2, :2]
  masks = [
    ((x - left) / width) ** 2 + ((y - top) / height) ** 2 < 0.25
    for (left, top), (width, height) in zip(centers, sides, strict=True)
  ]
  batch = {
    "image": np.zeros((1, 40, 40, 3), np.uint8),
    "boxes_cxcywh": np.concatenate([centers, sides], axis=1)[None] / 40,
    "labels": np.array([[0, 1]]),
    "is_target": np.ones((1, 2), bool),
    "masks": np.stack(masks)[None],
  }
  predictions = {
    "boxes_xyxy": boxes[None],
    "labels": np.array([[0, 1, 0]]),
    "scores": np.array([[0.9, 0.8, 0.0]]),
    "is_object": np.array([[True, True, False]]),
    "box_masks": np.broadcast_to(disc, (1, 3, 28, 28)).copy(),
  }
  evaluator = BoxMaskEvaluator(2)
  evaluator.add(batch, predictions)
  assert evaluator.result()["mask_ap"] > 0.85
  predictions["box_masks"][:, :, 14:] = 0  # half of each disc
  half = BoxMaskEvaluator(2)
  half.add(batch, predictions)
  assert half.result()["mask_ap75"] == 0
