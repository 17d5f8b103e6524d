"""Figures of detection: boxes, padding, masks."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from vit_jax_zoo.figures.detection import COLORS, draw_predictions, draw_targets

NAMES = ("cat", "dog", "bird")


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (3, 40, 60, 3), dtype=np.uint8),
    "image_size": np.array([[40, 60], [20, 50], [40, 30]]),
    "original_size": np.array([[80, 120], [40, 100], [40, 30]]),
    "boxes_cxcywh": np.tile(np.float32([[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1]]), (3, 1, 1)),
    "labels": np.array([[0, 1], [2, 9], [1, 1]]),
    "is_target": np.array([[True, True], [True, False], [False, False]]),
  }


@pytest.fixture
def predictions():
  return {
    "boxes_xyxy": np.tile(np.float32([[12, 8, 36, 24], [0, 0, 10, 10]]), (3, 1, 1)),
    "labels": np.array([[0, 1], [2, 0], [1, 0]]),
    "scores": np.array([[0.9, 0.8], [0.75, 0.1], [0.2, 0.1]]),
  }


def rectangles(ax):
  return [
    (*patch.get_xy(), patch.get_width(), patch.get_height())
    for patch in ax.patches
    if isinstance(patch, Rectangle)
  ]


def texts(ax):
  return [text.get_text() for text in ax.texts]


def test_targets_drawn_without_padding(batch):
  figure = draw_targets(batch, NAMES)
  first, second, third, *_ = figure.axes
  np.testing.assert_allclose(rectangles(first), [(24, 12, 12, 16), (0, 0, 30, 40)], rtol=1e-6)
  assert texts(first) == ["cat", "dog"]
  assert to_hex(first.patches[0].get_edgecolor()) == COLORS[0].lower()
  assert second.images[0].get_array().shape == (20, 50, 3)  # without padding
  np.testing.assert_allclose(rectangles(second), [(20, 6, 10, 8)], rtol=1e-6)
  assert rectangles(third) == []


def test_predictions_above_threshold(batch, predictions):
  figure = draw_predictions(batch, predictions, NAMES, threshold=0.7)
  truth, found, _, other, _, nothing, *_ = figure.axes
  assert len(rectangles(truth)) == 2
  # Boxes in pixels of the original image, drawn at half its size; the highest score on top.
  np.testing.assert_allclose(rectangles(found), [(0, 0, 5, 5), (6, 4, 12, 8)])
  assert texts(found) == ["dog 80%", "cat 90%"]
  assert texts(other) == ["bird 75%"]
  assert texts(nothing) == []
  assert "; highest 20%" in nothing.get_title(loc="left")


def test_padding_rows_and_unnamed_classes(batch, predictions):
  batch["mask"] = np.array([False, True, False])
  batch["is_target"][1, 1] = True
  figure = draw_predictions(batch, predictions, threshold=0.7)
  assert [len(ax.images) for ax in figure.axes] == [1, 1]
  assert texts(figure.axes[0]) == ["2", "9"]
  assert len(draw_targets(batch).axes[0].images) == 1
