"""What a two-stage detector learns from: which boxes belong to which target, and a few of them.

Ren et al., arXiv:1506.01497, section 3.1.2 (anchors); Girshick, arXiv:1504.08083, section 2.3
(proposals). One image at a time, fixed shapes: targets and samples are padded.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vit_jax_zoo.ops.boxes import box_area, pairwise_iou
from vit_jax_zoo.systems.rcnn.proposals import take_best


class Assignment(NamedTuple):
  """What each of n boxes is to be; neither foreground nor background: it does not matter."""

  foreground: Bool[Array, " n"]
  background: Bool[Array, " n"]
  target: Int[Array, " n"]  # that it overlaps most; any where it overlaps none


class Sample(NamedTuple):
  """Boxes to learn from: foreground first, then background, then padding."""

  index: Int[Array, " count"]
  exists: Bool[Array, " count"]
  foreground: Bool[Array, " count"]


def assign_anchors(
  anchors_xyxy: Float[Array, "n 4"],
  targets_xyxy: Float[Array, "t 4"],
  is_target: Bool[Array, " t"],
  *,
  valid: Bool[Array, " n"] | None = None,
  high: float = 0.7,
  low: float = 0.3,
) -> Assignment:
  """Tells anchors on objects from those on the background.

  Foreground: an IoU of at least `high` with some target, or the highest that a target has with any
  anchor (all those that share it), so that none goes without. Background: below `low` with all.

  Args:
    anchors_xyxy: like the targets, in pixels.
    targets_xyxy: anything in the padding.
    is_target: False in padding.
    valid: anchors that take part; others are neither, and no target's best.
    high: least IoU of foreground.
    low: IoU that background stays below.
  """
  valid = jnp.ones(len(anchors_xyxy), bool) if valid is None else valid
  overlap = _overlap(anchors_xyxy, targets_xyxy, is_target)
  overlap = jnp.where(valid[:, None], overlap, 0)
  most, target = _best(overlap)
  best_of_target = jnp.max(overlap, axis=0, initial=0)[None]
  is_best = jnp.any((overlap == best_of_target) & (overlap > 0), axis=1)
  foreground = (most >= high) | is_best
  return Assignment(foreground & valid, (most < low) & ~foreground & valid, target)


def assign_proposals(
  proposals_xyxy: Float[Array, "n 4"],
  targets_xyxy: Float[Array, "t 4"],
  is_target: Bool[Array, " t"],
  *,
  valid: Bool[Array, " n"],
  threshold: float = 0.5,
  is_crowd: Bool[Array, " t"] | None = None,
  crowd_share: float = 0.7,
) -> Assignment:
  """Tells proposals on objects from those on the background.

  Args:
    proposals_xyxy: like the targets, in pixels.
    targets_xyxy: anything in the padding.
    is_target: False in padding and for crowds.
    valid: False in padding.
    threshold: least IoU of foreground; all others are background.
    is_crowd: groups that nobody has outlined one by one. Boxes inside are no background.
    crowd_share: a box is inside a group with a larger share of its area than this.
  """
  most, target = _best(_overlap(proposals_xyxy, targets_xyxy, is_target))
  foreground = most >= threshold
  background = ~foreground
  if is_crowd is not None:
    inside = _share_inside(proposals_xyxy, targets_xyxy)
    background &= ~jnp.any((inside > crowd_share) & is_crowd[None], axis=1)
  return Assignment(foreground & valid, background & valid, target)


def sample_boxes(
  rng: jax.Array, assignment: Assignment, count: int, foreground_share: float
) -> Sample:
  """Draws boxes to learn from, each at most once.

  Args:
    rng: a PRNG key.
    assignment: of the boxes.
    count: how many are drawn. Padded where there are fewer.
    foreground_share: at most this share of them is foreground; background fills up.
  """
  keys = jax.random.uniform(rng, (2, len(assignment.target)))
  most = round(count * foreground_share)
  foreground, is_foreground = take_best(keys[0], assignment.foreground, most)
  background, is_background = take_best(keys[1], assignment.background, count)
  is_background &= jnp.arange(count) < count - jnp.sum(is_foreground)
  index = jnp.concatenate([foreground, background])
  exists = jnp.concatenate([is_foreground, is_background])
  order = jnp.argsort(~exists, stable=True)[:count]
  drawn_foreground = jnp.concatenate([is_foreground, jnp.zeros_like(is_background)])
  return Sample(index[order], exists[order], drawn_foreground[order])


def _overlap(
  boxes: Float[Array, "n 4"], targets: Float[Array, "t 4"], is_target: Bool[Array, " t"]
) -> Float[Array, "n t"]:
  return jnp.where(is_target[None], pairwise_iou(boxes, targets), 0)


def _best(overlap: Float[Array, "n t"]) -> tuple[Float[Array, " n"], Int[Array, " n"]]:
  if not overlap.shape[1]:
    return jnp.zeros(len(overlap)), jnp.zeros(len(overlap), jnp.int32)
  return jnp.max(overlap, axis=1), jnp.argmax(overlap, axis=1).astype(jnp.int32)


def _share_inside(boxes: Float[Array, "n 4"], others: Float[Array, "t 4"]) -> Float[Array, "n t"]:
  """Returns the share of each box's area that lies inside each of the others."""
  low = jnp.maximum(boxes[:, None, :2], others[None, :, :2])
  high = jnp.minimum(boxes[:, None, 2:], others[None, :, 2:])
  common = box_area(jnp.concatenate([low, high], axis=-1))
  area = box_area(boxes)[:, None]
  return jnp.where(area > 0, common / jnp.where(area > 0, area, 1), 0)
