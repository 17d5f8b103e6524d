"""Figures of DETR: attention of object queries, panoptic segments."""

import numpy as np
import pytest

from vit_jax_zoo.figures.canvas import heat_map
from vit_jax_zoo.systems.detr.figures import draw_query_attention, draw_segments, paint_segments
from vit_jax_zoo.systems.detr.panoptic import Segmentation


def example():
  batch = {
    "image": np.full((2, 8, 8, 3), 200, np.uint8),
    "image_size": np.array([[8, 8], [4, 8]]),
    "original_size": np.array([[16, 16], [8, 16]]),
  }
  attention = np.zeros((2, 3, 2, 2), np.float32)
  attention[:, 1, 0, 1] = 1.0
  predictions = {
    "scores": np.array([[0.2, 0.9, 0.6], [0.1, 0.3, 0.2]]),
    "labels": np.array([[0, 1, 2], [0, 1, 2]]),
    "boxes_xyxy": np.tile(np.array([4.0, 4.0, 12.0, 8.0]), (2, 3, 1)),
    "attention": attention,
  }
  return batch, predictions


def test_query_attention_draws_confident_queries_and_the_best():
  batch, predictions = example()
  figure = draw_query_attention(batch, predictions, ("a", "b"), threshold=0.5)
  rows = np.array(figure.axes[:-1]).reshape(2, 3)  # query 0 is never drawn
  assert [ax.get_title(loc="left") for ax in rows[0]] == ["", "b 90%, query 1", "2 60%, query 2"]
  assert [ax.get_title(loc="left") for ax in rows[1]] == ["", "b 30%, query 1", ""]
  image, heat = (ax.images[0].get_array() for ax in rows[0, :2])
  np.testing.assert_array_equal(heat[1, 6], heat_map(image[1:2, 6:7], np.ones((1, 1)))[0, 0])
  np.testing.assert_array_equal(heat[6, 1], heat_map(image[6:7, 1:2], np.zeros((1, 1)))[0, 0])
  assert rows[1, 1].images[0].get_array().shape == (4, 8, 3)  # without the padding
  box = rows[0, 1].patches[0]
  assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (2, 2, 4, 2)


def test_segments_have_color_and_class_name():
  image = np.zeros((4, 4, 3), np.uint8)
  segment_map = np.array([[0, 0, 1, 1]] * 2 + [[-1, -1, 1, 1]] * 2)
  painted = paint_segments(image, segment_map)
  assert len(np.unique(painted.reshape(-1, 3), axis=0)) == 3
  assert (painted[2:, :2] == 0).all()
  large = paint_segments(image, np.zeros((8, 8), int))
  assert large.shape == (8, 8, 3)
  truth = Segmentation(segment_map, np.array([0, 5]))
  nothing = Segmentation(np.full((4, 4), -1), np.array([], int))
  figure = draw_segments([truth], [nothing], [image], ("sky",))
  assert [text.get_text() for text in figure.axes[0].texts] == ["sky", "5"]
  assert figure.axes[0].get_title(loc="left") == "truth: 2"
  assert figure.axes[1].get_title(loc="left") == "predicted: 0"
  assert not figure.axes[1].texts


@pytest.mark.parametrize("count", [1, 3])
def test_panoptic_figure_has_two_panels_per_image(count):
  segments = [Segmentation(np.zeros((4, 4), int), np.array([0]))] * count
  figure = draw_segments(segments, segments, [np.zeros((4, 4, 3), np.uint8)] * count)
  assert sum(bool(ax.images) for ax in figure.axes) == 2 * count
