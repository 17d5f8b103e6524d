"""Box formats and overlaps, degenerate boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.ops import boxes


def iou_of_pair(a, b):
  return boxes.pairwise_iou(a[None], b[None])[0, 0]


def test_official_functions_golden(load_golden):
  _, inputs, outputs = load_golden("detr_fn_a")
  corners = boxes.cxcywh_to_xyxy(jnp.asarray(inputs["box_cxcywh"]))
  np.testing.assert_allclose(corners, outputs["box_xyxy"], atol=1e-6)
  left, right = jnp.asarray(inputs["giou_b1"]), jnp.asarray(inputs["giou_b2"])
  np.testing.assert_allclose(boxes.pairwise_iou(left, right), outputs["iou"], atol=1e-6)
  got = boxes.generalized_iou(left[:, None], right[None])
  np.testing.assert_allclose(got, outputs["giou"], atol=1e-6)


@pytest.mark.parametrize(
  ("a", "b", "iou", "giou"),
  [
    ([0, 0, 2, 2], [0, 0, 2, 2], 1, 1),
    ([0, 0, 1, 1], [2, 0, 3, 1], 0, -1 / 3),  # the gap is as wide as each box
    ([0, 0, 2, 1], [1, 0, 3, 1], 1 / 3, 1 / 3),
    ([0, 0, 0, 0], [0, 0, 0, 0], 0, 0),  # the same point: zero area
    ([0, 0, 0, 0], [1, 1, 1, 1], 0, -1),
    ([0, 0, 1, 0], [0, 0, 2, 0], 0, 0),  # two lines
    ([0.5, 0.5, 0.5, 0.5], [0, 0, 1, 1], 0, 0),
    ([1, 1, 0, 0], [0, 0, 1, 1], 0, 0),  # reversed corners
  ],
)
def test_iou_giou_values_and_finite_gradients(a, b, iou, giou):
  a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
  for function, expected in ((iou_of_pair, iou), (boxes.generalized_iou, giou)):
    value, gradients = jax.value_and_grad(function, argnums=(0, 1))(a, b)
    np.testing.assert_allclose(value, expected, atol=1e-6)
    assert np.isfinite(gradients).all()


def test_giou_symmetric_bounded_scale_invariant():
  rng = np.random.default_rng(0)
  corners = np.sort(rng.uniform(0, 1, (2, 50, 2, 2)), axis=2).reshape(2, 50, 4)
  a, b = jnp.asarray(corners.astype(np.float32))
  giou, iou = boxes.generalized_iou(a, b), jnp.diag(boxes.pairwise_iou(a, b))
  np.testing.assert_allclose(giou, boxes.generalized_iou(b, a), atol=1e-6)
  np.testing.assert_allclose(giou, boxes.generalized_iou(640 * a, 640 * b), atol=1e-5)
  assert np.all(giou <= iou + 1e-6)
  assert np.all(np.abs(giou) <= 1 + 1e-6)
