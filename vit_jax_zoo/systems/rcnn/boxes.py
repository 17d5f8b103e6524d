"""Boxes of R-CNN: conventions, coding, anchors, assignment, suppression, selection, RoIAlign.

arXiv:1506.01497, sections 3.1 and 3.3; one anchor size per pyramid level: arXiv:1612.03144, section
4.1. Boxes are (left, top, right, bottom) in pixels; right and bottom are exclusive.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from vit_jax_zoo.errors import part_fields
from vit_jax_zoo.ops.boxes import box_area, pairwise_iou
from vit_jax_zoo.ops.checks import check_positive


@dataclasses.dataclass(frozen=True)
class Convention:
  """Details in which implementations differ; weights need those that they were trained with."""

  anchors: str  # see `cell_anchors` (all three)
  mask_paste: str = "exact"  # see `masks.paste_masks` (Detectron's is another)
  aligned: bool = False  # half-pixel shift of RoIAlign, see `roi_align` (Detectron2)
  inclusive_boxes: bool = False  # RoIAlign's right and bottom are the last pixel (Detectron)
  inclusive_threshold: bool = False  # NMS also at an IoU equal to the threshold (Detectron)
  min_clipped_size: int = 0  # pixels that clipping leaves of a box outside the image (Detectron)
  min_proposal_size: float = 0.0  # pixels; smaller proposals are dropped (torchvision)
  min_detection_size: float = 0.0  # pixels; smaller detections are dropped (torchvision)


CONVENTIONS = {
  # Girshick et al., 2018, and its successors, the official code of FPT among them.
  "detectron": Convention(
    "detectron", "detectron", inclusive_boxes=True, inclusive_threshold=True, min_clipped_size=1
  ),
  "torchvision": Convention("torchvision", min_proposal_size=1e-3, min_detection_size=1e-2),
  "detectron2": Convention("detectron2", aligned=True),
}


# Of one kind, such as proposals or targets; deltas have the same shape.
Boxes: TypeAlias = Float[Array, "*#n 4"]
Mask: TypeAlias = Bool[Array, " n"]  # of boxes
# Factors of the four deltas, which bring them to the order of 1.
Weights: TypeAlias = tuple[float | int, float | int, float | int, float | int]

LOG_SIZE_LIMIT = math.log(1000 / 16)  # of a delta: early in training exp would overflow
CROWD_FRACTION = 0.7  # Detectron's CROWD_FILTER_THRESH
_MIN_SIDE = 1e-6  # pixels: deltas of empty boxes (in padding) are finite


def encode_boxes(
  boxes_xyxy: Boxes, references_xyxy: Boxes, weights: Weights = (1, 1, 1, 1)
) -> Boxes:
  """Returns (x - x_r) / w_r, (y - y_r) / h_r, log(w / w_r), log(h / h_r), times the weights."""
  center, size = _center_size(boxes_xyxy)
  reference_center, reference_size = _center_size(references_xyxy)
  reference_size = jnp.maximum(reference_size, _MIN_SIDE)
  shift = (center - reference_center) / reference_size
  growth = jnp.log(jnp.maximum(size, _MIN_SIDE) / reference_size)
  deltas = jnp.concatenate([shift, growth], axis=-1)
  return deltas * jnp.broadcast_to(jnp.asarray(weights, deltas.dtype), deltas.shape)


def decode_boxes(deltas: Boxes, references_xyxy: Boxes, weights: Weights = (1, 1, 1, 1)) -> Boxes:
  """Returns the boxes at the deltas from the references; the inverse of `encode_boxes`."""
  deltas = deltas / jnp.broadcast_to(jnp.asarray(weights, deltas.dtype), deltas.shape)
  reference_center, reference_size = _center_size(references_xyxy)
  center = reference_center + deltas[..., :2] * reference_size
  half = 0.5 * reference_size * jnp.exp(jnp.minimum(deltas[..., 2:], LOG_SIZE_LIMIT))
  return jnp.concatenate([center - half, center + half], axis=-1)


def clip_boxes(
  boxes_xyxy: Float[Array, "*b n 4"], image_size: Num[Array, "*b 2"], min_size: float | int = 0
) -> Float[Array, "*b n 4"]:
  """Returns boxes clipped to images of height and width; `min_size` pixels of each box remain."""
  limits = image_size.astype(boxes_xyxy.dtype)[..., None, ::-1]
  low = jnp.clip(boxes_xyxy[..., :2], 0, limits - min_size)
  high = jnp.clip(boxes_xyxy[..., 2:], min_size, limits)
  return jnp.concatenate([low, high], axis=-1)


def _center_size(boxes: Float[Array, "*n 4"]) -> tuple[Float[Array, "*n 2"], Float[Array, "*n 2"]]:
  size = boxes[..., 2:] - boxes[..., :2]
  return boxes[..., :2] + 0.5 * size, size


def cell_anchors(
  stride: int, size: float | int, aspect_ratios: Sequence[float | int], convention: str
) -> Float[np.ndarray, "a 4"]:
  """Returns the anchors of a map's first position, one for each aspect ratio (height / width).

  `size` is the square root of their area in pixels. "torchvision": centred at the image's corner,
  rounded to whole pixels; "detectron2": the same without rounding; "detectron": centred in the
  first stride x stride pixels, sides rounded at that size and then scaled, so that areas differ
  slightly between ratios.
  """
  ratios = np.asarray(aspect_ratios, np.float64)
  if convention == "detectron":
    widths = np.round(np.sqrt(stride * stride / ratios))
    half = size / stride * np.stack([widths, np.round(widths * ratios)], axis=1) / 2
    # Centre of pixels 0 ... stride - 1, which have integer positions; boxes are then inclusive.
    center = (stride - 1) / 2
    return np.concatenate([center - half + 0.5, center + half + 0.5], axis=1)
  roots = np.sqrt(ratios)
  half = np.stack([size / roots, size * roots], axis=1) / 2
  anchors = np.concatenate([-half, half], axis=1)
  return np.round(anchors) if convention == "torchvision" else anchors


def grid_anchors(
  cell: Float[np.ndarray, "a 4"], map_size: tuple[int, int], steps: tuple[int, int]
) -> Float[Array, "n 4"]:
  """Returns the anchors of all positions, row by row; `steps` are pixels between rows, columns."""
  rows, columns = (jnp.arange(side, dtype=jnp.float32) for side in map_size)
  y, x = jnp.meshgrid(rows * steps[0], columns * steps[1], indexing="ij")
  shift = jnp.stack([x, y, x, y], axis=-1)[:, :, None]
  return (shift + jnp.asarray(cell, jnp.float32)[None, None]).reshape(-1, 4)


def pyramid_anchors(
  cells: Sequence[Float[np.ndarray, "a 4"]],
  map_sizes: Sequence[tuple[int, int]],
  strides: Sequence[int],
  own_levels: int,
  convention: str,
) -> list[Float[Array, "_ 4"]]:
  """Returns the anchors of every level of a pyramid, from fine to coarse.

  They are `strides` pixels apart, except in torchvision's extra levels, those after the backbone's
  `own_levels`: it divides the image's sides by the map's, rounded down, which is less than the
  stride if sides were rounded up.
  """
  steps = [(stride, stride) for stride in strides]
  if convention == "torchvision":
    height, width = (side * strides[own_levels - 1] for side in map_sizes[own_levels - 1])
    steps[own_levels:] = [(height // h, width // w) for h, w in map_sizes[own_levels:]]
  return [grid_anchors(*level) for level in zip(cells, map_sizes, steps, strict=True)]


class Targets(NamedTuple):
  """Ground truth, padded; of one image or of a batch."""

  boxes_xyxy: Float[Array, "*b t 4"]  # pixels
  labels: Int[Array, "*b t"]
  is_target: Bool[Array, "*b t"]  # without crowds
  is_crowd: Bool[Array, "*b t"]


class Assignment(NamedTuple):
  """Assignment of n boxes; boxes that are neither foreground nor background are ignored."""

  foreground: Bool[Array, " n"]
  background: Bool[Array, " n"]
  target: Int[Array, " n"]  # index of the target with the highest IoU


def assign_anchors(
  anchors_xyxy: Boxes, targets: Targets, valid: Mask, fg_iou_thresh: float, bg_iou_thresh: float
) -> Assignment:
  """Assigns the valid anchors to targets or background.

  Foreground: IoU of at least `fg_iou_thresh` with a target, or the highest IoU of a target with any
  anchor (all ties), so that every target has one. Background: below `bg_iou_thresh` with all.
  """
  overlap = pairwise_iou(anchors_xyxy, targets.boxes_xyxy)
  overlap = jnp.where(targets.is_target[None] & valid[:, None], overlap, 0)
  iou, target = _best(overlap)
  best_of_target = jnp.max(overlap, axis=0, initial=0)[None]
  is_best = jnp.any((overlap == best_of_target) & (overlap > 0), axis=1)
  foreground = (iou >= fg_iou_thresh) | is_best
  return Assignment(foreground & valid, (iou < bg_iou_thresh) & ~foreground & valid, target)


def assign_proposals(
  proposals_xyxy: Boxes, targets: Targets, valid: Mask, fg_iou_thresh: float
) -> Assignment:
  """Assigns the valid proposals to targets (IoU of at least `fg_iou_thresh`) or background.

  Proposals with more than 0.7 of their area in a crowd, which is no target, are not background.
  """
  overlap = pairwise_iou(proposals_xyxy, targets.boxes_xyxy)
  iou, target = _best(jnp.where(targets.is_target[None], overlap, 0))
  foreground = iou >= fg_iou_thresh
  low = jnp.maximum(proposals_xyxy[:, None, :2], targets.boxes_xyxy[None, :, :2])
  high = jnp.minimum(proposals_xyxy[:, None, 2:], targets.boxes_xyxy[None, :, 2:])
  common, area = box_area(jnp.concatenate([low, high], axis=-1)), box_area(proposals_xyxy)[:, None]
  inside = jnp.where(area > 0, common / jnp.where(area > 0, area, 1), 0)
  in_crowd = jnp.any((inside > CROWD_FRACTION) & targets.is_crowd[None], axis=1)
  return Assignment(foreground & valid, ~foreground & ~in_crowd & valid, target)


def _best(overlap: Float[Array, "n t"]) -> tuple[Float[Array, " n"], Int[Array, " n"]]:
  if not overlap.shape[1]:
    return jnp.zeros(len(overlap)), jnp.zeros(len(overlap), jnp.int32)
  return jnp.max(overlap, axis=1), jnp.argmax(overlap, axis=1).astype(jnp.int32)


def sample_boxes(
  rng: jax.Array, assignment: Assignment, count: int, positive_fraction: float
) -> tuple[Int[Array, " count"], Bool[Array, " count"], Bool[Array, " count"]]:
  """Samples `count` boxes without replacement, at most `positive_fraction` of them foreground.

  Returns their indices, which exist, and which are foreground, those first and padding last.
  """
  keys = jax.random.uniform(rng, (2, len(assignment.target)))
  max_foreground = round(count * positive_fraction)
  foreground, is_foreground = top_k(keys[0], assignment.foreground, max_foreground)
  background, is_background = top_k(keys[1], assignment.background, count)
  is_background &= jnp.arange(count) < count - jnp.sum(is_foreground)
  index = jnp.concatenate([foreground, background])
  exists = jnp.concatenate([is_foreground, is_background])
  order = jnp.argsort(~exists, stable=True)[:count]
  drawn_foreground = jnp.concatenate([is_foreground, jnp.zeros_like(is_background)])
  return index[order], exists[order], drawn_foreground[order]


def top_k(
  scores: Float[Array, " n"], keep: Bool[Array, " n"], count: int
) -> tuple[Int[Array, " count"], Bool[Array, " count"]]:
  """Returns indices of the `count` highest scores to keep, of ties the earlier; and which exist."""
  available = min(count, len(scores))
  best, index = jax.lax.top_k(jnp.where(keep, scores, -jnp.inf), available)
  exists = keep[index] & (best > -jnp.inf)
  missing = count - available
  return jnp.pad(index, (0, missing)), jnp.pad(exists, (0, missing))


def non_max_suppression(
  boxes_xyxy: Float[Array, "n 4"],
  scores: Float[Array, " n"],
  threshold: float,
  *,
  valid: Bool[Array, " n"] | None = None,
  groups: Int[Array, " n"] | None = None,
  inclusive: bool = False,
) -> Bool[Array, " n"]:
  """Returns which of the valid boxes remain after non-maximum suppression.

  A box suppresses those of its group (such as a class) with a lower score, of ties the later ones,
  and an IoU above the threshold; `inclusive`: or equal to it, as in Detectron. Boxes whose score is
  NaN are removed; empty boxes overlap nothing.
  """
  valid = ~jnp.isnan(scores) & (jnp.ones_like(scores, bool) if valid is None else valid)
  order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), stable=True)
  boxes = boxes_xyxy[order]
  overlap = pairwise_iou(boxes, boxes)
  suppresses = overlap >= threshold if inclusive else overlap > threshold
  if groups is not None:
    suppresses &= groups[order][:, None] == groups[order][None]
  suppresses = jnp.triu(suppresses, k=1)  # only those with a lower score
  exists = valid[order]

  def suppress(keep: Bool[Array, " n"]) -> Bool[Array, " n"]:
    return exists & ~jnp.any(suppresses & keep[:, None], axis=0)

  # Each iteration makes the result of at least one more box final, from the highest score on.
  _, keep = jax.lax.while_loop(
    lambda state: jnp.any(state[0] != state[1]),
    lambda state: (state[1], suppress(state[1])),
    (exists, suppress(exists)),
  )
  return jnp.zeros_like(keep).at[order].set(keep, unique_indices=True)


@dataclasses.dataclass(frozen=True)
class ProposalLimits:
  """Selection of proposals; torchvision's arguments without their prefix "rpn_"."""

  pre_nms_top_n: int = 1000  # highest-scoring anchors per level before suppression
  post_nms_top_n: int = 1000  # highest-scoring proposals of all levels after suppression
  nms_thresh: float = 0.7  # IoU threshold of suppression


def pick_limits(given: Mapping[str, Any] | None, *, train: bool) -> ProposalLimits:
  """Returns `ProposalLimits` of a config, in which a pair of values is (training, inference)."""
  fields = {"pre_nms_top_n": (2000, 1000), "post_nms_top_n": (2000, 1000)}
  chosen = {}
  for name, value in {**fields, **(given or {})}.items():
    pair = value if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2:
      raise ValueError(f"proposals.{name}: {value}; expected a number or (training, inference)")
    chosen[name] = pair[0 if train else 1]
  limits = ProposalLimits(**part_fields("proposals", ProposalLimits, chosen))
  check_positive(limits, "pre_nms_top_n", "post_nms_top_n")
  return limits


def choose_proposals(
  objectness: Float[Array, " n"],
  deltas: Float[Array, "n 4"],
  image_size: Num[Array, " 2"],
  *,
  anchors_xyxy: Float[Array, "n 4"],
  lengths: Sequence[int],
  limits: ProposalLimits,
  convention: Convention,
) -> tuple[Float[Array, "p 4"], Float[Array, " p"], Bool[Array, " p"]]:
  """Returns boxes, logits (highest first) and existence of an image's proposals.

  Anchors, logits and deltas are those of all levels, which have `lengths`.
  """
  levels, start, inclusive = [], 0, convention.inclusive_threshold
  for length in lengths:
    level = objectness[start : start + length]
    scores, index = jax.lax.top_k(level, min(limits.pre_nms_top_n, length))
    index = index + start
    boxes = decode_boxes(deltas[index], anchors_xyxy[index])
    boxes = clip_boxes(boxes, image_size, convention.min_clipped_size)
    sides = boxes[:, 2:] - boxes[:, :2]  # NaN is not valid
    valid = jnp.all((sides > 0) & (sides >= convention.min_proposal_size), axis=1)
    keep = non_max_suppression(boxes, scores, limits.nms_thresh, valid=valid, inclusive=inclusive)
    levels.append((boxes, scores, keep))
    start += length
  boxes, scores, keep = (jnp.concatenate(parts) for parts in zip(*levels, strict=True))
  index, exists = top_k(scores, keep, limits.post_nms_top_n)
  boxes = jnp.where(exists[:, None], boxes[index], 0)
  return boxes, jnp.where(exists, scores[index], -jnp.inf), exists


@dataclasses.dataclass(frozen=True)
class DetectionLimits:
  """Selection of detections; fields of `InstanceDetection` without their prefixes."""

  score_thresh: float = 0.05
  nms_thresh: float = 0.5
  detections_per_img: int = 100
  reg_weights: Weights = (10.0, 10.0, 5.0, 5.0)
  # (box, class) pairs before suppression; no effect while `detections_per_img` of them remain
  max_candidates: int = 2000


def choose_detections(
  logits: Float[Array, "p k"],
  deltas: Float[Array, "p k 4"],
  proposals_xyxy: Float[Array, "p 4"],
  exists: Bool[Array, " p"],
  image_size: Num[Array, " 2"],
  *,
  limits: DetectionLimits,
  convention: Convention,
) -> tuple[Float[Array, "q 4"], Float[Array, " q"], Int[Array, " q"], Bool[Array, " q"]]:
  """Returns boxes, scores (highest first), labels and existence of an image's detections.

  They are classified proposals, whose last class is the background.
  """
  classes = logits.shape[1] - 1
  scores = jnp.where(exists[:, None], jax.nn.softmax(logits)[:, :-1], 0).reshape(-1)
  count = min(limits.max_candidates, len(scores))
  pair, candidate = top_k(scores, scores > limits.score_thresh, count)
  row, label, score = pair // classes, pair % classes, scores[pair]
  boxes = decode_boxes(deltas[row, label], proposals_xyxy[row], limits.reg_weights)
  boxes = clip_boxes(boxes, image_size, convention.min_clipped_size)
  large = jnp.all(boxes[:, 2:] - boxes[:, :2] >= convention.min_detection_size, axis=1)
  options: dict[str, Any] = {"groups": label, "inclusive": convention.inclusive_threshold}
  keep = non_max_suppression(boxes, score, limits.nms_thresh, valid=candidate & large, **options)
  best, there = top_k(score, keep, limits.detections_per_img)
  boxes, score = jnp.where(there[:, None], boxes[best], 0), jnp.where(there, score[best], 0)
  return boxes, score, jnp.where(there, label[best], 0).astype(jnp.int32), there


# RoIAlign: crops of a feature map at a fixed size. He et al., arXiv:1703.06870, section 3.
#
# A box is divided into size x size bins; each bin is the mean of 2 x 2 points, read with bilinear
# interpolation. If `aligned`, a pixel's value is at its centre, (i + 0.5) * stride (Detectron2,
# torchvision's option). Otherwise, as in the original, it is at i * stride; boxes have at least one
# map step per side, and in Detectron inclusive right and bottom (pass those as they are).
#
# Points up to one step outside the map have the border's values, those further away are 0. Large
# maps' points are gathered; small maps are multiplied by interpolation matrices, which is faster.

SAMPLES = 2  # points along each side of a bin, as in all published configs with a fixed number
USE_MATRICES = 1024  # maximum number of map positions for interpolation matrices
USE_MATRICES_FOR_MASKS = 128**2  # the same for masks, which have one channel
_ROUNDING = 1e-4  # map steps: boxes often end exactly at the limit of one step


class _Points(NamedTuple):
  """Sample points of every box along one axis, [r size samples]."""

  at: Array  # in map steps
  weight: Array  # in the bin's mean; 0 outside the map


def box_levels(
  boxes_xyxy: Float[Array, "*r 4"], levels: tuple[int, int], size: float | int, level: int
) -> Int[Array, "*r"]:
  """Returns the pyramid level to crop each box from. Lin et al., arXiv:1612.03144, Eq. 1.

  floor(level + log2(sqrt(area) / size + 1e-6)), clipped to the finest and coarsest of `levels`;
  level l has stride 2^l, and boxes are in pixels.
  """
  sides = jnp.maximum(boxes_xyxy[..., 2:] - boxes_xyxy[..., :2], 0)
  ratio = jnp.sqrt(sides[..., 0] * sides[..., 1]) / size
  return jnp.clip(jnp.floor(level + jnp.log2(ratio + 1e-6)), *levels).astype(jnp.int32)


def roi_align(
  pyramid: Sequence[Float[Array, "b _ _ c"]],
  boxes_xyxy: Float[Array, "b r 4"],
  level_index: Int[Array, "b r"],
  *,
  strides: Sequence[float | int],
  size: int,
  aligned: bool = True,
) -> Float[Array, "b r size size c"]:
  """Returns the crops of boxes, each from one level of the pyramid.

  `level_index` is the index of each box's map, `size` the side of the crops; boxes and strides are
  in pixels of the image. For `aligned` see the comment above `SAMPLES`.
  """

  def multiply(features: Float[Array, "h w c"], boxes: Float[Array, "r 4"]) -> Array:
    rows, columns = _points(features.shape[:2], boxes, size, aligned=aligned)
    by_row = _interpolation(rows, features.shape[0]).astype(features.dtype)
    by_column = _interpolation(columns, features.shape[1]).astype(features.dtype)
    partial = jnp.einsum("rih,hwc->riwc", by_row, features)
    return jnp.einsum("rjw,riwc->rijc", by_column, partial)

  large, result = [math.prod(x.shape[1:3]) > USE_MATRICES for x in pyramid], 0.0
  for index, (features, stride) in enumerate(zip(pyramid, strides, strict=True)):
    if not large[index]:
      crops = jax.vmap(multiply)(features, boxes_xyxy / stride)
      result = result + jnp.where((level_index == index)[..., None, None, None], crops, 0)
  if any(large):
    gathered = [(x, s) for x, s, is_large in zip(pyramid, strides, large, strict=True) if is_large]
    number = jnp.cumsum(jnp.asarray(large, jnp.int32)) - 1  # among the large maps
    crops = _gathered(gathered, boxes_xyxy, number[level_index], size, aligned=aligned)
    result = result + jnp.where(jnp.asarray(large)[level_index][..., None, None, None], crops, 0)
  return jnp.asarray(result)


def crop_masks(
  masks: Bool[Array, "t h w"], index: Int[Array, " r"], boxes_xyxy: Float[Array, "r 4"], size: int
) -> Bool[Array, "r size size"]:
  """Returns crops of the masks at `index`, the targets of a mask head.

  Boxes are in pixels of the masks. A bin is True if at least half of its 2 x 2 points are.
  """
  height, width = masks.shape[1:]
  rows, columns = _points((height, width), boxes_xyxy, size, aligned=True)
  if height * width <= USE_MATRICES_FOR_MASKS:
    by_row, by_column = _interpolation(rows, height), _interpolation(columns, width)
    crops = jnp.einsum("rih,rhw,rjw->rij", by_row, masks[index].astype(by_row.dtype), by_column)
  else:
    table = masks.reshape(-1, 1).astype(jnp.float32)
    shape = jnp.broadcast_to(jnp.asarray([height, width], jnp.int32), (len(index), 2))
    crops = _interpolate(table, index * (height * width), shape, rows, columns)[..., 0]
  return crops >= 0.5


def _points(
  map_size: tuple[int, ...], boxes: Float[Array, "r 4"], size: int, *, aligned: bool
) -> tuple[_Points, _Points]:
  extent = boxes[:, 2:] - boxes[:, :2]
  if not aligned:
    extent = jnp.maximum(extent, 1.0)
  bins = (jnp.arange(size * SAMPLES, dtype=boxes.dtype) + 0.5) / SAMPLES
  steps = (extent / size)[..., None] * bins[None, None]
  at = (boxes[:, :2] - (0.5 if aligned else 0.0))[..., None] + steps
  at = at.reshape(len(boxes), 2, size, SAMPLES)

  def along(side: int, at: Array) -> _Points:
    inside = (at >= -1 - _ROUNDING) & (at <= side + _ROUNDING)
    return _Points(jnp.clip(at, 0, side - 1), jnp.where(inside, 1 / SAMPLES, 0).astype(at.dtype))

  return along(map_size[0], at[:, 1]), along(map_size[1], at[:, 0])


def _interpolation(points: _Points, side: int) -> Float[Array, "r size side"]:
  positions = jnp.arange(side, dtype=points.at.dtype)[None, None, None]
  distance = jnp.abs(points.at[..., None] - positions)
  return jnp.sum(points.weight[..., None] * jnp.maximum(1 - distance, 0), axis=2)


def _gathered(
  levels: Sequence[tuple[Array, Any]], boxes: Array, level_index: Array, size: int, *, aligned: bool
) -> Float[Array, "b r size size c"]:
  """Gathers each box's points from its level (index clipped) in one table of all levels.

  `levels` are maps [b _ _ c] and their strides; the others are arguments of `roi_align`.
  """
  batch, channels = levels[0][0].shape[0], levels[0][0].shape[-1]
  table = jnp.concatenate([x.reshape(batch, -1, channels) for x, _ in levels], axis=1)
  shapes = [(x.shape[1], x.shape[2]) for x, _ in levels]
  lengths = [math.prod(shape) for shape in shapes]
  offsets = jnp.asarray([sum(lengths[:i]) for i in range(len(levels))], jnp.int32)

  def one_image(table: Array, boxes: Array, index: Array) -> Float[Array, "r size size c"]:
    points = [
      _points(shape, boxes / stride, size, aligned=aligned)
      for shape, (_, stride) in zip(shapes, levels, strict=True)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *points)
    rows, columns = jax.tree.map(lambda leaf: leaf[index, jnp.arange(len(index))], stacked)
    map_size = jnp.asarray(shapes, jnp.int32)[index]
    return _interpolate(table, offsets[index], map_size, rows, columns)

  return jax.vmap(one_image)(table, boxes, jnp.clip(level_index, 0, len(levels) - 1))


def _interpolate(
  table: Float[Array, "n c"], offset: Array, map_size: Array, rows: _Points, columns: _Points
) -> Float[Array, "r size size c"]:
  """Interpolates between four neighbours; `table` has each box's map, row by row, from `offset`."""
  boxes, size, samples = rows.at.shape
  y, y_weight, x, x_weight = (leaf.reshape(boxes, -1) for leaf in (*rows, *columns))
  result = 0.0
  for y_index, y_fraction in _neighbours(y, map_size[:, 0]):
    for x_index, x_fraction in _neighbours(x, map_size[:, 1]):
      index = y_index[:, :, None] * map_size[:, 1, None, None] + x_index[:, None]
      weight = (y_weight * y_fraction)[:, :, None] * (x_weight * x_fraction)[:, None]
      values = table[index + offset[:, None, None]]
      result = result + values * weight.astype(table.dtype)[..., None]
  bins = jnp.asarray(result).reshape(boxes, size, samples, size, samples, -1)
  return jnp.sum(bins, axis=(2, 4))


def _neighbours(
  at: Float[Array, "r p"], side: Int[Array, " r"]
) -> list[tuple[Int[Array, "r p"], Float[Array, "r p"]]]:
  low = jnp.floor(at)
  fraction = at - low
  index = low.astype(jnp.int32)
  return [(index, 1 - fraction), (jnp.minimum(index + 1, side[:, None] - 1), fraction)]
