"""The parts of DETR's set loss: what a pair costs, and what is learned from matched pairs.

Carion et al., arXiv:2005.12872, Eq. 1 and 2, sections A.1 and A.2. Sums, not means: who calls
divides by what the whole batch, on all devices, has.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from vit_jax_zoo.ops.boxes import cxcywh_to_xyxy, generalized_iou, pairwise_generalized_iou

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # arXiv:1708.02002


def matching_cost(
  logits: Float[Array, "*b q k"],
  boxes_cxcywh: Float[Array, "*b q 4"],
  labels: Int[Array, "*b t"],
  target_boxes_cxcywh: Float[Array, "*b t 4"],
  *,
  weights: tuple[float | int, float | int, float | int],
) -> Float[Array, "*b q t"]:
  """Returns what giving target t to query q costs (Eq. 1 and the text after it).

  Args:
    logits: of the classes and, last, of "no object".
    boxes_cxcywh: predicted, in shares of the image.
    labels: of the targets; what lies outside the classes counts as the nearest one.
    target_boxes_cxcywh: of the targets.
    weights: of the class's probability, of the boxes' L1 distance, of their generalised IoU.
  """
  probabilities = jax.nn.softmax(logits, axis=-1)
  wanted = jnp.clip(labels, 0, logits.shape[-1] - 1)[..., None, :]
  pairs = (*boxes_cxcywh.shape[:-1], labels.shape[-1])
  chance = jnp.take_along_axis(probabilities, jnp.broadcast_to(wanted, pairs), axis=-1)
  offset = boxes_cxcywh[..., :, None, :] - target_boxes_cxcywh[..., None, :, :]
  overlap = pairwise_generalized_iou(
    cxcywh_to_xyxy(boxes_cxcywh), cxcywh_to_xyxy(target_boxes_cxcywh)
  )
  by_class, by_distance, by_overlap = weights
  distance = jnp.sum(jnp.abs(offset), axis=-1)
  return by_distance * distance - by_class * chance - by_overlap * overlap


def class_losses(
  logits: Float[Array, "*b q k"],
  labels: Int[Array, "*b t"],
  target_of_query: Int[Array, "*b q"],
  no_object_weight: float,
) -> tuple[Float[Array, "*b q"], Float[Array, "*b q"]]:
  """Returns each query's weighted cross-entropy, and its weight.

  A query without a target is to say "no object", the last class, with a small weight: there are
  many of them.
  """
  no_object = logits.shape[-1] - 1
  matched = target_of_query >= 0
  wanted = jnp.where(matched, take_targets(labels, target_of_query), no_object)
  log_p = jax.nn.log_softmax(logits, axis=-1)
  losses = -jnp.take_along_axis(log_p, wanted[..., None], axis=-1)[..., 0]
  weights = jnp.where(matched, 1.0, no_object_weight)
  return weights * losses, weights


def box_losses(
  boxes_cxcywh: Float[Array, "*b q 4"],
  target_boxes_cxcywh: Float[Array, "*b t 4"],
  target_of_query: Int[Array, "*b q"],
) -> tuple[Float[Array, "*b q"], Float[Array, "*b q"]]:
  """Returns L1 distance and 1 - generalised IoU of each query and its target, 0 without one."""
  matched = target_of_query >= 0
  wanted = jnp.where(matched[..., None], take_targets(target_boxes_cxcywh, target_of_query), 0.5)
  distance = jnp.sum(jnp.abs(boxes_cxcywh - wanted), axis=-1)
  overlap = generalized_iou(cxcywh_to_xyxy(boxes_cxcywh), cxcywh_to_xyxy(wanted))
  return jnp.where(matched, distance, 0.0), jnp.where(matched, 1 - overlap, 0.0)


def covering_target(
  points: Float[Array, "b n 2"],
  target_boxes_cxcywh: Float[Array, "b t 4"],
  is_target: Bool[Array, "b t"],
) -> Int[Array, "b n"]:
  """Returns the index of the smallest target around each point (x, y), -1 where there is none.

  As FCOS assigns its locations, Tian et al., arXiv:1904.01355, section 3.1.
  """
  if not is_target.shape[1]:
    return jnp.full(points.shape[:2], -1, jnp.int32)
  offset = jnp.abs(points[:, :, None] - target_boxes_cxcywh[:, None, :, :2])
  inside = jnp.all(offset <= 0.5 * target_boxes_cxcywh[:, None, :, 2:], axis=-1)
  inside &= is_target[:, None]
  area = jnp.prod(target_boxes_cxcywh[..., 2:], axis=-1)[:, None]
  smallest = jnp.argmin(jnp.where(inside, area, jnp.inf), axis=-1)
  return jnp.where(jnp.any(inside, axis=-1), smallest, -1).astype(jnp.int32)


def take_targets(values: Array, target_of_query: Int[Array, "*b q"]) -> Array:
  """Returns the row of `values` [*b t ...] for every query; any row where it has no target."""
  trailing = values.ndim - target_of_query.ndim
  if values.shape[target_of_query.ndim - 1] == 0:
    shape = (*target_of_query.shape, *values.shape[target_of_query.ndim :])
    return jnp.zeros(shape, values.dtype)
  index = jnp.maximum(target_of_query, 0).reshape(*target_of_query.shape, *(1,) * trailing)
  return jnp.take_along_axis(values, index, axis=target_of_query.ndim - 1)


def mask_losses(
  mask_logits: Float[Array, "b q i j"],
  masks: Bool[Array, "b t h w"],
  query_of_target: Int[Array, "b t"],
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
  """Returns focal loss (mean over pixels) and dice loss of each target's mask, 0 without a query.

  Predictions are enlarged to the targets' size. Padding counts as background, as in the paper's
  code. Targets go through one by one, and again in the backward pass: at 800 x 1333 pixels the
  masks of a hundred take gigabytes.
  """
  size = masks.shape[2:]

  @jax.checkpoint
  def one_target(
    arguments: tuple[Bool[Array, "b h w"], Int[Array, " b"]],
  ) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    target, query = arguments
    index = jnp.maximum(query, 0)[:, None, None, None]
    logits = jnp.take_along_axis(mask_logits, index, axis=1)[:, 0]
    logits = jax.image.resize(logits, (len(logits), *size), "linear", antialias=False)
    wanted = target.astype(jnp.float32)
    matched = query >= 0
    focal, dice = focal_loss(logits, wanted), dice_loss(logits, wanted)
    return jnp.where(matched, focal, 0.0), jnp.where(matched, dice, 0.0)

  if not masks.shape[1]:
    nothing = jnp.zeros(query_of_target.shape)
    return nothing, nothing
  focal, dice = jax.lax.map(one_target, (jnp.moveaxis(masks, 1, 0), query_of_target.T))
  return focal.T, dice.T


def focal_loss(
  logits: Float[Array, "*b h w"], targets: Float[Array, "*b h w"]
) -> Float[Array, "*b"]:
  """Returns the sigmoid focal loss, mean over pixels. Lin et al., arXiv:1708.02002, Eq. 5."""
  losses = optax.sigmoid_focal_loss(logits, targets, alpha=FOCAL_ALPHA, gamma=FOCAL_GAMMA)
  return jnp.mean(losses, axis=(-2, -1))


def dice_loss(
  logits: Float[Array, "*b h w"], targets: Float[Array, "*b h w"]
) -> Float[Array, "*b"]:
  """Returns 1 - (2 sum p t + 1) / (sum p + sum t + 1). Milletari et al., arXiv:1606.04797."""
  probabilities = jax.nn.sigmoid(logits)
  both = jnp.sum(probabilities * targets, axis=(-2, -1))
  either = jnp.sum(probabilities, axis=(-2, -1)) + jnp.sum(targets, axis=(-2, -1))
  return 1 - (2 * both + 1) / (either + 1)
