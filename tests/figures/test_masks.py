"""Figures of instance masks."""

import numpy as np

from vit_jax_zoo.figures.detection import draw_masks


def test_ground_truth_and_detections_side_by_side():
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
