"""Box deltas: official values, inverse, limits, empty boxes."""

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax_zoo.ops.boxes import pairwise_iou
from vit_jax_zoo.systems.rcnn import boxes as coding


def exclusive(inclusive_xyxy):
  """Returns Detectron's boxes with exclusive right and bottom edges."""
  return inclusive_xyxy + jnp.float32([[0, 0, 1, 1]])


def inclusive(boxes_xyxy):
  return boxes_xyxy.at[..., 2:].add(-1)


def test_box_coding_equals_official_code(load_golden):
  _, inputs, outputs = load_golden("fpt_det_a")

  @jax.jit
  def code(boxes, targets, deltas):
    boxes, targets = exclusive(boxes), exclusive(targets)
    decoded = [
      inclusive(coding.decode_boxes(deltas, boxes[:, None], weights))
      for weights in ((10, 10, 5, 5), (1, 1, 1, 1))
    ]
    encoded = coding.encode_boxes(targets, boxes, (10, 10, 5, 5))
    return encoded, decoded, pairwise_iou(boxes, targets)

  deltas = inputs["deltas"].reshape(-1, 2, 4)
  encoded, decoded, overlap = code(inputs["ex_boxes"], inputs["gt_boxes"], deltas)
  np.testing.assert_allclose(encoded, outputs["bbox_transform_inv_w10"], rtol=1e-5, atol=1e-5)
  for boxes, name in zip(decoded, ("w10", "w1"), strict=True):
    expected = outputs[f"bbox_transform_{name}"].reshape(-1, 2, 4)
    np.testing.assert_allclose(boxes, expected, rtol=1e-5, atol=1e-3)  # pixels
  np.testing.assert_allclose(overlap, outputs["overlaps"], atol=1e-6)


def test_clipping_equals_official_code(load_golden):
  _, _, outputs = load_golden("fpt_det_a")
  boxes = exclusive(jnp.asarray(outputs["bbox_transform_w1"].reshape(-1, 4)))
  clipped = coding.clip_boxes(boxes, jnp.asarray([150, 200]), min_size=1)
  expected = outputs["clip_tiled"].reshape(-1, 4)
  np.testing.assert_allclose(inclusive(clipped), expected, atol=1e-3)  # pixels


def random_boxes(rng, count):
  corners = np.sort(rng.uniform(-20, 120, (count, 2, 2)), axis=1)
  return jnp.asarray(corners.reshape(count, 4).astype(np.float32))


def test_decoding_inverts_encoding():
  rng = np.random.default_rng(0)
  boxes, references = random_boxes(rng, 50), random_boxes(rng, 50)
  weights = (10, 10, 5, 5)
  deltas = coding.encode_boxes(boxes, references, weights)
  big_enough = np.all(np.asarray(deltas[:, 2:]) < 5 * coding.LOG_SIZE_LIMIT, axis=1)
  assert big_enough.sum() > 40
  decoded = coding.decode_boxes(deltas, references, weights)
  np.testing.assert_allclose(decoded[big_enough], boxes[big_enough], atol=2e-3)
  unit = jnp.asarray([[10.0, 20, 30, 60]])
  moved = coding.decode_boxes(jnp.asarray([[0.5, -0.25, np.log(2), 0]], jnp.float32), unit)
  np.testing.assert_allclose(moved, [[10, 10, 50, 50]], atol=1e-4)


def test_decoded_size_is_limited_and_finite():
  unit = jnp.asarray([[0.0, 0, 16, 16]])
  huge = coding.decode_boxes(jnp.full((1, 4), 1e4), unit)
  np.testing.assert_allclose(huge[:, 2:] - huge[:, :2], [[1000, 1000]], rtol=1e-3)
  gradient = jax.grad(lambda d: jnp.sum(coding.decode_boxes(d, unit)))(jnp.full((1, 4), 1e4))
  assert np.isfinite(gradient).all()
  empty = jnp.asarray([[5.0, 5, 5, 5]])
  for boxes, references in ((empty, unit), (unit, empty), (empty, empty)):
    assert np.isfinite(coding.encode_boxes(boxes, references)).all()


def test_boxes_are_clipped_to_own_image_size():
  boxes = jnp.broadcast_to(jnp.asarray([[-5.0, 2, 50, 90], [60, 70, 80, 95]]), (2, 2, 4))
  clipped = coding.clip_boxes(boxes, jnp.asarray([[40, 30], [100, 70]]))
  expected = [[[0, 2, 30, 40], [30, 40, 30, 40]], [[0, 2, 50, 90], [60, 70, 70, 95]]]
  np.testing.assert_array_equal(clipped, expected)
