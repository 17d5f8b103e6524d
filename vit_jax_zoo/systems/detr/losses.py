"""DETR's matching cost and losses, in the order of the paper (arXiv:2005.12872, 3.1 and A.2).

Losses are per query, target or image: the task divides their sums by counts of the whole step.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from vit_jax_zoo.ops.boxes import cxcywh_to_xyxy, generalized_iou
from vit_jax_zoo.tasks import base
from vit_jax_zoo.tasks.base import image_size, is_target

Logits: TypeAlias = Float[Array, "*b q k"]
Boxes: TypeAlias = Float[Array, "*b q 4"]
Labels: TypeAlias = Int[Array, "*b t"]
TargetBoxes: TypeAlias = Float[Array, "*b t 4"]
# Of the class, the boxes' L1 distance and their generalised IoU.
Weights: TypeAlias = tuple[float | int, float | int, float | int]


def matching_cost(
  logits: Logits, boxes_cxcywh: Boxes, labels: Labels, targets_cxcywh: TargetBoxes, weights: Weights
) -> Float[Array, "*b q t"]:
  """Returns the cost of assigning target t to query q (L_match of Eq. 1).

  The last logit is that of "no object"; labels out of range are clipped.
  """
  by_class, by_distance, by_overlap = weights
  index = jnp.clip(labels, 0, logits.shape[-1] - 1)[..., None, :]
  index = jnp.broadcast_to(index, (*boxes_cxcywh.shape[:-1], labels.shape[-1]))
  probability = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), index, axis=-1)
  offset = boxes_cxcywh[..., :, None, :] - targets_cxcywh[..., None, :, :]
  distance = jnp.sum(jnp.abs(offset), axis=-1)
  boxes, targets = cxcywh_to_xyxy(boxes_cxcywh), cxcywh_to_xyxy(targets_cxcywh)
  overlap = generalized_iou(boxes[..., :, None, :], targets[..., None, :, :])
  return by_distance * distance - by_class * probability - by_overlap * overlap


def class_losses(
  logits: Logits, labels: Labels, target_of_query: Int[Array, "*b q"], no_object_weight: float
) -> tuple[Float[Array, "*b q"], Float[Array, "*b q"]]:
  """Returns the weighted cross-entropy of each query, and its weight (Eq. 2, first term)."""
  matched = target_of_query >= 0
  label = jnp.where(matched, take_targets(labels, target_of_query), logits.shape[-1] - 1)
  log_p = jax.nn.log_softmax(logits, axis=-1)
  weights = jnp.where(matched, 1.0, no_object_weight).astype(log_p.dtype)
  return -weights * jnp.take_along_axis(log_p, label[..., None], axis=-1)[..., 0], weights


def box_losses(
  boxes_cxcywh: Boxes, targets_cxcywh: TargetBoxes, target_of_query: Int[Array, "*b q"]
) -> tuple[Float[Array, "*b q"], Float[Array, "*b q"]]:
  """Returns each query's L1 and generalised IoU loss, 0 without a target (L_box, L_iou; A.2)."""
  matched = target_of_query >= 0
  targets = jnp.where(matched[..., None], take_targets(targets_cxcywh, target_of_query), 0.5)
  distance = jnp.sum(jnp.abs(boxes_cxcywh - targets), axis=-1)
  overlap = generalized_iou(cxcywh_to_xyxy(boxes_cxcywh), cxcywh_to_xyxy(targets))
  return jnp.where(matched, distance, 0.0), jnp.where(matched, 1 - overlap, 0.0)


def mask_losses(
  mask_logits: Float[Array, "b q i j"],
  masks: Bool[Array, "b t h w"],
  query_of_target: Int[Array, "b t"],
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
  """Returns the focal and the dice loss of each target's mask (4.4, A.2), 0 without a query.

  Predictions are resized to the size of the targets, with padding as background, as in the official
  code. Targets are processed one after the other and recomputed in the backward pass: at 800 x 1333
  pixels the masks of a hundred targets take gigabytes.
  """

  @jax.checkpoint
  def one_target(mask_and_query: tuple[Array, Array]) -> tuple[Array, Array]:
    mask, query = mask_and_query
    target, matched = mask.astype(jnp.float32), query >= 0
    index = jnp.maximum(query, 0)[:, None, None, None]
    logits = jnp.take_along_axis(mask_logits, index, axis=1)[:, 0]
    logits = jax.image.resize(logits, target.shape, "linear", antialias=False)
    # Lin et al., arXiv:1708.02002, Eq. 5, mean over pixels.
    focal = optax.sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2.0)
    focal, dice = jnp.mean(focal, axis=(-2, -1)), dice_loss(logits, target)
    return jnp.where(matched, focal, 0.0), jnp.where(matched, dice, 0.0)

  focal, dice = jax.lax.map(one_target, (jnp.moveaxis(masks, 1, 0), query_of_target.T))
  return focal.T, dice.T


def dice_loss(logits: Float[Array, "b h w"], targets: Float[Array, "b h w"]) -> Float[Array, " b"]:
  """Returns 1 - (2 sum p t + 1) / (sum p + sum t + 1) (L_DICE of A.2)."""
  probabilities = jax.nn.sigmoid(logits)
  both = jnp.sum(probabilities * targets, axis=(-2, -1))
  either = jnp.sum(probabilities, axis=(-2, -1)) + jnp.sum(targets, axis=(-2, -1))
  return 1 - (2 * both + 1) / (either + 1)


def dense_auxiliary_loss(
  outputs: Mapping[str, Any], batch: base.Batch, weights: Weights, no_object_weight: float
) -> Float[Array, " b"]:
  """Returns each image's loss of the heads' predictions for the encoder's tokens. Not in the paper.

  The target of a token is the smallest box around its centre. Classes are averaged over tokens by
  their weights, boxes over the tokens with a target. `outputs` has `dense_logits` [b i j k] and
  `dense_boxes_cxcywh` [b i j 4].
  """
  if "dense_logits" not in outputs:
    raise ValueError("dense_weight: needs model.dense_predictions=True; set it, or dense_weight=0")
  rows, height, width, classes = outputs["dense_logits"].shape
  logits = outputs["dense_logits"].reshape(rows, -1, classes).astype(jnp.float32)
  boxes = outputs["dense_boxes_cxcywh"].reshape(rows, -1, 4)
  targets = target_boxes(batch)
  of_token = covering_target(token_centers(batch, (height, width)), targets, is_target(batch))
  by_class, by_distance, by_overlap = weights
  labels = jnp.asarray(batch["labels"])
  class_loss, of_class = class_losses(logits, labels, of_token, no_object_weight)
  distance, overlap = box_losses(boxes, targets, of_token)
  covered = jnp.maximum(jnp.sum(of_token >= 0, axis=1, dtype=jnp.float32), 1)
  box_loss = jnp.sum(by_distance * distance + by_overlap * overlap, axis=1) / covered
  return by_class * jnp.sum(class_loss, axis=1) / jnp.sum(of_class, axis=1) + box_loss


def covering_target(
  points: Float[Array, "b n 2"], boxes_cxcywh: Float[Array, "b t 4"], is_target: Bool[Array, "b t"]
) -> Int[Array, "b n"]:
  """Returns the index of the smallest target around each point (x, y), -1 without one.

  As FCOS assigns its locations, Tian et al., arXiv:1904.01355, section 3.1.
  """
  if not is_target.shape[1]:
    return jnp.full(points.shape[:2], -1, jnp.int32)
  offset = jnp.abs(points[:, :, None] - boxes_cxcywh[:, None, :, :2])
  inside = jnp.all(offset <= 0.5 * boxes_cxcywh[:, None, :, 2:], axis=-1)
  inside &= is_target[:, None]
  area = jnp.prod(boxes_cxcywh[..., 2:], axis=-1)[:, None]
  smallest = jnp.argmin(jnp.where(inside, area, jnp.inf), axis=-1)
  return jnp.where(jnp.any(inside, axis=-1), smallest, -1).astype(jnp.int32)


def token_centers(batch: base.Batch, grid: tuple[int, int]) -> Float[Array, "b n 2"]:
  """Returns the centres (x, y) of a map's tokens, row by row, relative to the unpadded image."""
  rows = (jnp.arange(grid[0], dtype=jnp.float32) + 0.5) / grid[0]
  columns = (jnp.arange(grid[1], dtype=jnp.float32) + 0.5) / grid[1]
  centers = jnp.stack(jnp.meshgrid(columns, rows), axis=-1).reshape(1, -1, 2)
  padded = jnp.asarray(batch["image"].shape[1:3], jnp.float32)
  scale = padded[None] / jnp.maximum(image_size(batch), 1).astype(jnp.float32)
  return centers * scale[:, None, ::-1]


def target_boxes(batch: base.Batch) -> Float[Array, "b t 4"]:
  """Returns the targets' boxes, cxcywh, and 0.5 in padding, whose values are undefined."""
  boxes = jnp.asarray(batch["boxes_cxcywh"], jnp.float32)
  return jnp.where(is_target(batch)[..., None], boxes, 0.5)


def take_targets(values: Array, target_of_query: Int[Array, "*b q"]) -> Array:
  """Returns the row of `values` [*b t ...] of every query's target; any row without a target."""
  axis = target_of_query.ndim - 1
  if values.shape[axis] == 0:
    return jnp.zeros((*target_of_query.shape, *values.shape[axis + 1 :]), values.dtype)
  trailing = (1,) * (values.ndim - axis - 1)
  index = jnp.maximum(target_of_query, 0).reshape(*target_of_query.shape, *trailing)
  return jnp.take_along_axis(values, index, axis=axis)
