"""Non-maximum suppression, proposals and detections, per image and with static shapes.

Ren et al., arXiv:1506.01497, section 3.3.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from vit_jax_zoo.errors import part_fields
from vit_jax_zoo.ops.boxes import pairwise_iou
from vit_jax_zoo.ops.checks import check_positive
from vit_jax_zoo.systems.rcnn.anchors import Convention, Weights, clip_boxes, decode_boxes, top_k


def non_max_suppression(
  boxes_xyxy: Float[Array, "n 4"],
  scores: Float[Array, " n"],
  threshold: float,
  *,
  valid: Bool[Array, " n"] | None = None,
  groups: Int[Array, " n"] | None = None,
  inclusive: bool = False,
) -> Bool[Array, " n"]:
  """Returns which boxes remain after non-maximum suppression.

  Args:
    boxes_xyxy: boxes; empty ones overlap nothing.
    scores: scores; of ties the earlier box comes first. Boxes with NaN are removed.
    threshold: IoU above which a box suppresses another.
    valid: False for padding.
    groups: boxes of different groups (such as classes) do not suppress each other.
    inclusive: also suppresses at an IoU equal to the threshold, as in Detectron.
  """
  valid = ~jnp.isnan(scores) & (jnp.ones_like(scores, bool) if valid is None else valid)
  order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), stable=True)
  boxes = boxes_xyxy[order]
  overlap = pairwise_iou(boxes, boxes)
  hits = overlap >= threshold if inclusive else overlap > threshold
  if groups is not None:
    hits &= groups[order][:, None] == groups[order][None]
  place = jnp.arange(len(scores))
  hits &= place[:, None] < place[None]
  exists = valid[order]

  def decide(keep: Bool[Array, " n"]) -> Bool[Array, " n"]:
    return exists & ~jnp.any(hits & keep[:, None], axis=0)

  # From the highest score on, each round settles at least one more box.
  _, keep = jax.lax.while_loop(
    lambda state: jnp.any(state[0] != state[1]),
    lambda state: (state[1], decide(state[1])),
    (exists, decide(exists)),
  )
  return jnp.zeros_like(keep).at[order].set(keep, unique_indices=True)


@dataclasses.dataclass(frozen=True)
class ProposalLimits:
  """Selection of proposals; torchvision's arguments without their prefix "rpn_"."""

  pre_nms_top_n: int = 1000  # highest-scoring anchors per level before suppression
  post_nms_top_n: int = 1000  # highest-scoring proposals of all levels after suppression
  nms_thresh: float = 0.7  # IoU threshold of suppression


def pick_limits(given: Mapping[str, Any] | None, *, train: bool) -> ProposalLimits:
  """Returns the limits for training (2000 boxes by default) or inference.

  Args:
    given: fields of `ProposalLimits`; a pair of values is (training, inference).
    train: selects the first of a pair.

  Raises:
    ValueError: a field is unknown, has neither one nor two values, or is not positive.
  """
  fields = {"pre_nms_top_n": (2000, 1000), "post_nms_top_n": (2000, 1000)}
  fields |= part_fields("proposals", ProposalLimits, given)
  chosen = {}
  for name, value in fields.items():
    pair = value if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2:
      raise ValueError(
        f"proposals.{name}: {value}; expected a number or a pair (training, inference)"
      )
    chosen[name] = pair[0 if train else 1]
  limits = ProposalLimits(**chosen)
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

  The anchors, their logits and box deltas are those of all levels, of which `lengths` has the
  numbers; `image_size` is height and width without padding.
  """
  kept, start = [], 0
  for length in lengths:
    level = objectness[start : start + length]
    scores, index = jax.lax.top_k(level, min(limits.pre_nms_top_n, length))
    index = index + start
    boxes = decode_boxes(deltas[index], anchors_xyxy[index])
    boxes = clip_boxes(boxes, image_size, convention.min_clipped_size)
    sides = boxes[:, 2:] - boxes[:, :2]
    # False for NaN
    valid = jnp.all((sides > 0) & (sides >= convention.min_proposal_size), axis=1)
    keep = non_max_suppression(
      boxes, scores, limits.nms_thresh, valid=valid, inclusive=convention.inclusive_threshold
    )
    kept.append((boxes, scores, keep))
    start += length
  boxes, scores, keep = (jnp.concatenate(parts) for parts in zip(*kept, strict=True))
  index, exists = top_k(scores, keep, limits.post_nms_top_n)
  boxes = jnp.where(exists[:, None], boxes[index], 0)
  return boxes, jnp.where(exists, scores[index], -jnp.inf), exists


@dataclasses.dataclass(frozen=True)
class DetectionLimits:
  """Selection of detections; torchvision's arguments without their prefix "box_"."""

  score_thresh: float = 0.05  # detections with a lower score are dropped
  nms_thresh: float = 0.5  # IoU threshold of suppression, per class
  detections_per_img: int = 100  # maximum number of detections
  # number of highest-scoring (box, class) pairs before suppression. No effect as long as
  # `detections_per_img` of them remain.
  max_candidates: int = 2000
  reg_weights: Weights = (10.0, 10.0, 5.0, 5.0)  # weights of the deltas, see `anchors.encode_boxes`


class Detections(NamedTuple):
  """Detections, highest score first."""

  boxes_xyxy: Float[Array, "*b q 4"]
  scores: Float[Array, "*b q"]
  labels: Int[Array, "*b q"]
  exists: Bool[Array, "*b q"]


def choose_detections(
  logits: Float[Array, "p k"],
  deltas: Float[Array, "p k 4"],
  proposals_xyxy: Float[Array, "p 4"],
  exists: Bool[Array, " p"],
  image_size: Num[Array, " 2"],
  *,
  limits: DetectionLimits,
  convention: Convention,
) -> Detections:
  """Returns the detections among an image's classified proposals.

  The background's logits and deltas are the last; `image_size` is height and width without padding.
  """
  probabilities = jax.nn.softmax(logits)[:, :-1]
  classes = probabilities.shape[1]
  scores = jnp.where(exists[:, None], probabilities, 0).reshape(-1)
  pair, candidate = top_k(
    scores, scores > limits.score_thresh, min(limits.max_candidates, len(scores))
  )
  row, label, score = pair // classes, pair % classes, scores[pair]
  boxes = decode_boxes(deltas[row, label], proposals_xyxy[row], limits.reg_weights)
  boxes = clip_boxes(boxes, image_size, convention.min_clipped_size)
  large = jnp.all(boxes[:, 2:] - boxes[:, :2] >= convention.min_detection_size, axis=1)
  keep = non_max_suppression(
    boxes,
    score,
    limits.nms_thresh,
    valid=candidate & large,
    groups=label,
    inclusive=convention.inclusive_threshold,
  )
  best, there = top_k(score, keep, limits.detections_per_img)
  return Detections(
    jnp.where(there[:, None], boxes[best], 0),
    jnp.where(there, score[best], 0),
    jnp.where(there, label[best], 0).astype(jnp.int32),
    there,
  )
