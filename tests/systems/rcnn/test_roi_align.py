"""RoIAlign against its definition, in both conventions and both implementations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.half_precision import bfloat16_errors
from vit_jax_zoo.systems.rcnn import boxes as ops


def bilinear(features, y, x):
  """Interpolates a map at a point: the border extends one step outside, then zero."""
  height, width = features.shape[:2]
  if not (-1 <= y <= height and -1 <= x <= width):
    return np.zeros(features.shape[2])
  y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
  top, left = int(y), int(x)
  bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
  dy, dx = y - top, x - left
  above = (1 - dx) * features[top, left] + dx * features[top, right]
  below = (1 - dx) * features[bottom, left] + dx * features[bottom, right]
  return (1 - dy) * above + dy * below


def definition(features, box, stride, size, aligned):
  left, top, right, bottom = np.asarray(box, np.float64) / stride
  width, height = right - left, bottom - top
  if aligned:
    left, top = left - 0.5, top - 0.5
  else:
    width, height = max(width, 1), max(height, 1)
  result = np.zeros((size, size, features.shape[2]))
  for i, j, k, m in itertools.product(range(size), range(size), range(2), range(2)):
    y = top + (i + (k + 0.5) / 2) * height / size
    x = left + (j + (m + 0.5) / 2) * width / size
    result[i, j] += bilinear(features, y, x) / 4
  return result


def align(features, boxes, stride, **fields):
  """Compiles anew each time: the implementation is selected while tracing."""
  level = jnp.zeros((1, len(boxes)), jnp.int32)
  function = jax.jit(lambda x, y: ops.roi_align([x], y, level, strides=[stride], **fields)[0])
  return np.asarray(function(jnp.asarray(features)[None], jnp.asarray(boxes)[None]))


BOXES = np.array(
  [
    [10.3, 20.1, 100.7, 90.2],
    [0, 0, 96, 72],  # the whole image
    [-30, -20, 40, 30],  # partly outside
    [80, 60, 140, 100],
    [200, 200, 220, 230],  # far outside
    [50, 40, 50, 40],  # a point
    [60, 50, 55, 45],  # inverted sides
    [3, 3, 3.5, 60],  # a line
  ],
  np.float32,
)


@pytest.mark.parametrize("implementation", ["matrices", "gathering"])
@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align_equals_definition(monkeypatch, aligned, implementation):
  monkeypatch.setattr(ops, "USE_MATRICES", 1024 if implementation == "matrices" else 0)
  features = np.random.default_rng(0).normal(size=(9, 12, 3)).astype(np.float32)
  got = align(features, BOXES, 8, size=7, aligned=aligned)
  for box, crop in zip(BOXES, got, strict=True):
    expected = definition(features, box, 8, 7, aligned)
    np.testing.assert_allclose(crop, expected, atol=2e-5, err_msg=f"{box}")


def test_roi_align_equals_official_code(load_golden):
  config, inputs, outputs = load_golden("fpt_det_a")
  features = inputs["roi_feat"].transpose(0, 2, 3, 1)
  for size in (7, 14):
    expected = outputs[f"roi_align_{size}_s2"].transpose(0, 2, 3, 1)
    stride = 1 / config["roi_scale"]
    for image in range(2):
      rows = inputs["rois"][:, 0] == image
      boxes = inputs["rois"][rows, 1:]
      got = align(features[image], boxes, stride, size=size, aligned=False)
      np.testing.assert_allclose(got, expected[rows], atol=1e-5)


def test_box_levels_equal_official_code(load_golden):
  _, inputs, outputs = load_golden("fpt_det_a")
  boxes = jnp.asarray(inputs["level_rois"]) + jnp.float32([[0, 0, 1, 1]])  # exclusive
  levels = ops.box_levels(boxes, (2, 5), 224, 4)
  np.testing.assert_array_equal(levels, outputs["level_of_roi"])


def test_box_levels_of_known_and_empty_boxes():
  sides = np.array([0, 10, 111.9, 112, 223.9, 224, 448, 1e5])
  boxes = jnp.asarray(np.stack([0 * sides, 0 * sides, sides, sides], axis=1), jnp.float32)
  assert list(ops.box_levels(boxes, (2, 5), 224, 4)) == [2, 2, 2, 3, 3, 4, 5, 5]
  small = ops.box_levels(boxes / 16, (0, 3), 14, 2)
  assert list(small) == [0, 0, 0, 1, 1, 2, 3, 3]


@pytest.fixture(scope="module")
def pyramid():
  rng = np.random.default_rng(1)
  return [jnp.asarray(rng.normal(size=(2, 36 // s, 48 // s, 4)), jnp.float32) for s in (1, 2, 4)]


@pytest.mark.parametrize("limit", [0, 500, 10_000])  # all gathered, the finest alone, none
def test_roi_align_reads_each_box_from_its_level(monkeypatch, pyramid, limit):
  monkeypatch.setattr(ops, "USE_MATRICES", limit)
  rng = np.random.default_rng(2)
  boxes = np.sort(rng.uniform(-10, 110, (2, 6, 2, 2)), axis=2).reshape(2, 6, 4).astype(np.float32)
  level = rng.integers(0, 3, (2, 6))
  strides = (2, 4, 8)

  def pooled(pyramid):
    return ops.roi_align(pyramid, jnp.asarray(boxes), jnp.asarray(level), strides=strides, size=3)

  got = jax.jit(pooled)(pyramid)
  for image, box in itertools.product(range(2), range(6)):
    chosen = level[image, box]
    features = np.asarray(pyramid[chosen][image])
    expected = definition(features, boxes[image, box], strides[chosen], 3, True)
    np.testing.assert_allclose(got[image, box], expected, atol=2e-5)


def test_roi_align_implementations_have_equal_gradients(monkeypatch, pyramid):
  boxes = jnp.asarray(BOXES[None, :5] / 2)
  target = jnp.asarray(np.random.default_rng(3).normal(size=(1, 5, 7, 7, 4)), jnp.float32)

  def gradient(limit):
    monkeypatch.setattr(ops, "USE_MATRICES", limit)
    level = jnp.zeros((1, 5), jnp.int32)

    def loss(features):
      crops = ops.roi_align([features], boxes, level, strides=(4,), size=7)
      return jnp.sum(crops * target)

    return jax.jit(jax.grad(loss))(pyramid[1][:1])

  by_matrices, by_gathering = gradient(10_000), gradient(0)
  assert np.abs(by_matrices).max() > 0.1
  np.testing.assert_allclose(by_matrices, by_gathering, atol=1e-5)


@pytest.mark.parametrize("limit", [0, 10_000])
def test_crop_masks_equals_definition(monkeypatch, limit):
  monkeypatch.setattr(ops, "USE_MATRICES_FOR_MASKS", limit)
  masks = np.zeros((2, 20, 30), bool)
  masks[0, 5:15, 10:20] = True
  masks[1] = np.add.outer(np.arange(20), np.arange(30)) < 25
  boxes = jnp.asarray(
    [[10, 5, 20, 15], [5, 0, 25, 20], [0, 0, 30, 20], [-4, -4, 8, 8]], jnp.float32
  )
  index = jnp.asarray([0, 0, 1, 1])
  got = jax.jit(lambda masks: ops.crop_masks(masks, index, boxes, 8))(jnp.asarray(masks))
  assert got[0].all()
  expected = np.zeros((8, 8), bool)
  expected[2:6, 2:6] = True
  np.testing.assert_array_equal(got[1], expected)
  for i in (2, 3):
    soft = definition(masks[1][..., None].astype(float), boxes[i], 1, 8, True)[..., 0]
    np.testing.assert_array_equal(got[i], soft >= 0.5 - 1e-6)


def test_bfloat16_gradients_of_many_boxes_are_near_float32():
  maps = [
    jax.random.normal(jax.random.key(i), (1, side, side, 4)) for i, side in ((0, 40), (1, 20))
  ]
  corners = jnp.sort(jax.random.uniform(jax.random.key(2), (1, 512, 2, 2)) * 160, axis=2)
  level = jax.random.randint(jax.random.key(3), (1, 512), 0, 2)

  def crops(*maps):
    boxes = corners.reshape(1, 512, 4)
    return ops.roi_align(maps, boxes, level, strides=(4, 8), size=7)

  assert max(bfloat16_errors(crops, *maps)) < 0.01
