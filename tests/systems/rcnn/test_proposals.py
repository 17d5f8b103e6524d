"""Selection of proposals and of detections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_zoo.systems.rcnn.boxes import (
  CONVENTIONS,
  DetectionLimits,
  ProposalLimits,
  choose_detections,
  choose_proposals,
  pick_limits,
)

TORCHVISION = CONVENTIONS["torchvision"]
jitted = jax.jit(choose_detections, static_argnames=("limits", "convention"))


def test_proposals_are_best_of_each_level_then_of_all():
  anchors = jnp.asarray(
    [
      [0, 0, 10, 10],
      [1, 0, 11, 10],
      [20, 20, 30, 30],
      [40, 40, 60, 60],
      [90, 90, 99, 99],
      [0, 0, 9, 9],
    ],
    jnp.float32,
  )
  logits = jnp.asarray([3.0, 2.0, 1.0, 5.0, 4.0, 6.0])
  choose = jax.jit(
    lambda logits, deltas: choose_proposals(
      logits, deltas, jnp.asarray([50, 50]), anchors_xyxy=anchors, lengths=(3, 3),
      limits=ProposalLimits(pre_nms_top_n=2, post_nms_top_n=4), convention=TORCHVISION,
    )
  )  # fmt: skip
  boxes, scores, exists = choose(logits, jnp.zeros((6, 4)))
  # Level 0: the second is suppressed, the third is beyond pre_nms_top_n. Level 1: the last and the
  # fourth remain, clipped to the image. Levels do not suppress each other.
  assert list(np.asarray(scores)[np.asarray(exists)]) == [6, 5, 3]
  np.testing.assert_allclose(boxes[1], [40, 40, 50, 50])
  np.testing.assert_allclose(boxes[3], 0)
  _, scores, exists = choose(logits, jnp.zeros((6, 4)).at[5].set(jnp.nan))
  assert list(np.asarray(scores)[np.asarray(exists)]) == [5, 3]


def test_detections_are_suppressed_per_class():
  rng = np.random.default_rng(0)
  corners = rng.uniform(0, 40, (30, 2))
  proposals = jnp.asarray(np.concatenate([corners, corners + 20], axis=1), jnp.float32)
  logits = jnp.asarray(rng.normal(size=(30, 4)) * 3, jnp.float32)
  deltas = jnp.asarray(rng.normal(size=(30, 4, 4)), jnp.float32)

  def choose(**limits):
    return jitted(
      logits, deltas, proposals, jnp.arange(30) < 28, jnp.asarray([64, 64]),
      limits=DetectionLimits(detections_per_img=8, **limits), convention=TORCHVISION,
    )  # fmt: skip

  every, few = choose(max_candidates=1000), choose(max_candidates=40)
  _, scores, labels, exists = every
  assert exists.all()
  for one, other in zip(every, few, strict=True):
    np.testing.assert_array_equal(one, other)
  probabilities = np.asarray(jax.nn.softmax(logits))[:28, :3]
  np.testing.assert_allclose(scores[0], probabilities.max(), rtol=1e-6)
  assert int(labels[0]) == probabilities.max(axis=0).argmax()
  assert not choose(score_thresh=0.999999)[3].any()


@pytest.mark.parametrize(("convention", "min_size"), [("torchvision", 0.01), ("detectron2", 0.0)])
def test_torchvision_detections_drop_small_boxes(convention, min_size):
  """Boxes beside the image are empty after clipping; torchvision drops them."""
  proposals = jnp.asarray([[0, 0, 8, 8], [70, 0, 78, 8], [20, 20, 20.005, 30]], jnp.float32)
  logits = jnp.asarray([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
  *_, exists = jitted(
    logits, jnp.zeros((3, 2, 4)), proposals, jnp.ones(3, bool), jnp.asarray([64, 64]),
    limits=DetectionLimits(detections_per_img=3), convention=CONVENTIONS[convention],
  )  # fmt: skip
  assert int(exists.sum()) == (1 if min_size else 3)


def test_limits_differ_for_training_and_evaluation():
  fields = {"pre_nms_top_n": (20, 10), "post_nms_top_n": 5}
  assert pick_limits(fields, train=True) == ProposalLimits(20, 5)
  assert pick_limits(fields, train=False) == ProposalLimits(10, 5)
