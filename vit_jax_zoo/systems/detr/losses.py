"""DETR's matching and losses, in the order of the paper (arXiv:2005.12872, 3.1 and A.2).

Losses are per query, target or image: the task divides their sums by counts of the whole step.

Exact matching on the accelerator by successive shortest paths: it grows by one pair at a time along
the cheapest augmenting path, found with Dijkstra's algorithm on costs that potentials keep
non-negative. In `optax.assignment.hungarian_algorithm` padding would need a cost, which changes the
result or loses true costs in rounding, and would take as much time as targets.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from vit_jax_zoo.ops.boxes import cxcywh_to_xyxy, generalized_iou
from vit_jax_zoo.ops.sharding import on_own_examples
from vit_jax_zoo.tasks import base
from vit_jax_zoo.tasks.base import image_size, is_target

_LARGEST_COST = 1e6  # replaces larger and non-finite costs; float32 resolves 0.06 there

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


class Matching(NamedTuple):
  """Indices of matched pairs: -1 for queries without a target, for padding and excess targets."""

  target_of_query: Int[Array, "*b q"]
  query_of_target: Int[Array, "*b t"]


class _State(NamedTuple):
  """A matching, and potentials for which every reduced cost is non-negative."""

  target_of_query: Int[Array, " q"]
  query_of_target: Int[Array, " t"]
  query_potential: Float[Array, " q"]
  target_potential: Float[Array, " t"]


class _Search(NamedTuple):
  """Dijkstra's tables."""

  distance: Float[Array, " q"]  # from the free targets
  parent: Int[Array, " q"]  # target before the query; -1 if the path from a free target is direct
  visited: Bool[Array, " q"]
  nearest: Int[Array, ""]


def match(cost: Float[Array, "*b q t"], is_target: Bool[Array, "*b t"]) -> Matching:
  """Returns the min(queries, targets) pairs of minimum total cost. Not differentiable.

  Non-finite costs are replaced by very large (or small) ones. Padding and the order of targets
  affect only ties.

  >>> cost = jnp.array([[3.0, 1.0], [1.0, 2.0], [0.0, 0.0]])
  >>> match(cost, jnp.array([True, False])).target_of_query
  Array([-1, -1,  0], dtype=int32)
  """
  solve = _match_one
  for _ in range(cost.ndim - 2):
    solve = jax.vmap(solve)
  cost = jnp.swapaxes(jax.lax.stop_gradient(cost), -1, -2).astype(jnp.float32)
  cost = jnp.nan_to_num(cost, nan=_LARGEST_COST, posinf=_LARGEST_COST, neginf=-_LARGEST_COST)
  cost = jnp.clip(cost, -_LARGEST_COST, _LARGEST_COST)
  # Each device solves for its own examples: loops over a sharded batch would synchronise all
  # devices in every iteration.
  return on_own_examples(solve, cost, is_target) if cost.ndim > 2 else solve(cost, is_target)


def _match_one(cost: Float[Array, "t q"], is_target: Bool[Array, " t"]) -> Matching:
  num_targets, num_queries = cost.shape
  none = jnp.full(num_queries, -1, jnp.int32), jnp.full(num_targets, -1, jnp.int32)
  if not num_targets or not num_queries:
    return Matching(*none)
  # Potentials must be equal among free targets, and zero for free queries: only then does the
  # nearest free query end the cheapest path.
  lowest = jnp.min(cost, initial=_LARGEST_COST, where=is_target[:, None])
  state = _State(*none, jnp.zeros(num_queries, cost.dtype), jnp.full(num_targets, lowest))
  pairs = jnp.minimum(jnp.sum(is_target), num_queries)
  state = jax.lax.fori_loop(0, pairs, lambda _, s: _augment(cost, is_target, s), state)
  return Matching(state.target_of_query, state.query_of_target)


def _augment(cost: Float[Array, "t q"], is_target: Bool[Array, " t"], state: _State) -> _State:
  """Adds one pair to the matching, along the cheapest path from a free target to a free query.

  Under `vmap` it also runs for problems that are already solved; the result is discarded, but the
  loops must end: without a free target all distances are infinite.
  """
  free = is_target & (state.query_of_target < 0)
  # The only pass over the whole matrix: a minimum, many times faster than an argmin on CPUs.
  cheapest = jnp.min(jnp.where(free[:, None], cost, jnp.inf), axis=0)
  level = jnp.max(jnp.where(free, state.target_potential, -jnp.inf))  # the same for all of them
  distance = cheapest - level - state.query_potential
  no_parent, unvisited = jnp.full(distance.shape, -1, jnp.int32), jnp.zeros(distance.shape, bool)
  search = jax.lax.while_loop(
    lambda s: (state.target_of_query[s.nearest] >= 0) & jnp.isfinite(s.distance[s.nearest]),
    lambda s: _step(cost, state, s),
    _Search(distance, no_parent, unvisited, jax.lax.argmin(distance, 0, jnp.int32)),
  )
  length = search.distance[search.nearest]
  # Raises nearer potentials to the path's length: its reduced cost becomes zero.
  gain = jnp.where(search.visited, length - search.distance, 0.0)
  matched = state.query_of_target >= 0
  target_gain = jnp.where(matched, gain[state.query_of_target], jnp.where(free, length, 0.0))
  potentials = state.query_potential - gain, state.target_potential + target_gain
  return _State(*_flip_path(cost, free, search, state), *potentials)


def _step(cost: Float[Array, "t q"], state: _State, search: _Search) -> _Search:
  """Visits the nearest query: relaxes the distances of all others by way of its target."""
  here = search.distance[search.nearest]
  visited = search.visited.at[search.nearest].set(True)
  target = state.target_of_query[search.nearest]
  reduced = cost[target] - state.target_potential[target] - state.query_potential
  shorter = ~visited & (here + reduced < search.distance)
  distance = jnp.where(shorter, here + reduced, search.distance)
  nearest = jax.lax.argmin(jnp.where(visited, jnp.inf, distance), 0, jnp.int32)
  return _Search(distance, jnp.where(shorter, target, search.parent), visited, nearest)


def _flip_path(
  cost: Float[Array, "t q"], free: Bool[Array, " t"], search: _Search, state: _State
) -> tuple[Int[Array, " q"], Int[Array, " t"]]:
  """Flips the matching along the path, from its end to its start."""

  def flip(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    query, target_of_query, query_of_target = carry
    direct = jax.lax.argmin(jnp.where(free, cost[:, query], jnp.inf), 0, jnp.int32)
    target = jnp.where(search.parent[query] < 0, direct, search.parent[query])
    flipped = target_of_query.at[query].set(target), query_of_target.at[target].set(query)
    return query_of_target[target], *flipped

  end = jnp.where(jnp.isfinite(search.distance[search.nearest]), search.nearest, -1)
  start = (end, state.target_of_query, state.query_of_target)
  return jax.lax.while_loop(lambda carry: carry[0] >= 0, flip, start)[1:]


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
