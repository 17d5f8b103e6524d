"""Anchors against the official code, and against hand-computed values."""

import numpy as np
import pytest

from vit_jax_zoo.systems.rcnn.boxes import cell_anchors, grid_anchors, pyramid_anchors


def test_anchors_equal_official_code(load_golden):
  _, _, outputs = load_golden("fpt_det_a")
  for level in range(2, 7):
    cell = cell_anchors(2**level, 32 * 2 ** (level - 2), (0.5, 1, 2), convention="detectron")
    np.testing.assert_array_equal(cell - [0, 0, 1, 1], outputs[f"anchors_lvl{level}"])


def test_torchvision_anchors_round_corners():
  for size, expected in (  # AnchorGenerator(((32, 64),), ...)
    (32, [[23, 11], [16, 16], [11, 23]]),
    (64, [[45, 23], [32, 32], [23, 45]]),
  ):
    cell = cell_anchors(16, size, (0.5, 1.0, 2.0), "torchvision")
    np.testing.assert_array_equal(cell[:, 2:], expected)
    np.testing.assert_array_equal(cell[:, :2], -cell[:, 2:])


def test_detectron_anchors_scale_rounded_boxes():
  """generate_anchors(16, (128, 256), (0.5, 1)): 23 x 12 and 16 x 16, times 8 and 16."""
  for size, expected in (
    (128, [[-84, -40, 99, 55], [-56, -56, 71, 71]]),
    (256, [[-176, -88, 191, 103], [-120, -120, 135, 135]]),
  ):
    cell = cell_anchors(16, size, (0.5, 1), convention="detectron")
    np.testing.assert_array_equal(cell - [0, 0, 1, 1], expected)


def test_detectron2_anchors_keep_area():
  cell = cell_anchors(16, 32, (0.5, 1.0, 2.0), convention="detectron2")
  areas = np.prod(cell[:, 2:] - cell[:, :2], axis=1)
  np.testing.assert_allclose(areas, [32**2] * 3)
  np.testing.assert_allclose(cell[0, 2:] / cell[0, 3], [2, 1])
  np.testing.assert_array_equal(cell[:, :2], -cell[:, 2:])


@pytest.mark.parametrize("convention", ["torchvision", "detectron"])
def test_grid_anchors_are_row_major(convention):
  cell = cell_anchors(8, 12, (0.5, 1), convention=convention)
  grid = np.asarray(grid_anchors(cell, (2, 3), (8, 8)))
  expected = [
    box + 8 * np.array([column, row, column, row])
    for row in range(2)
    for column in range(3)
    for box in cell
  ]
  np.testing.assert_array_equal(grid, expected)


def test_torchvision_extra_level_stride_is_image_size_over_map_size():
  """AnchorGenerator: strides 128 // 2 and 160 // 3, as a map of 5 columns is halved to 3."""
  sizes, cells = [(8, 10), (4, 5), (2, 3)], [np.zeros((1, 4))] * 3

  def corners(convention):
    levels = pyramid_anchors(cells, sizes, (16, 32, 64), 2, convention=convention)
    return [np.asarray(level)[:, :2].tolist() for level in levels]

  *own, last = corners("torchvision")
  for convention in ("detectron", "detectron2"):
    *same, regular = corners(convention)
    assert same == own
    assert regular == [[0, 0], [64, 0], [128, 0], [0, 64], [64, 64], [128, 64]]
  assert own[1][1] == [32, 0]
  assert own[1][5] == [0, 32]
  assert last == [[0, 0], [53, 0], [106, 0], [0, 64], [53, 64], [106, 64]]
