"""From what a network says of every anchor to a fixed number of boxes, and from boxes to finds.

One image at a time; Ren et al., arXiv:1506.01497, section 3.3. Where there is less, it is padded.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from vit_jax_zoo.ops.boxes import pairwise_iou
from vit_jax_zoo.ops.checks import check_positive
from vit_jax_zoo.systems.rcnn.anchors import Weights, clip_boxes, decode_boxes
from vit_jax_zoo.systems.rcnn.conventions import Convention


def non_max_suppression(
  boxes_xyxy: Float[Array, "n 4"],
  scores: Float[Array, " n"],
  threshold: float,
  *,
  valid: Bool[Array, " n"] | None = None,
  groups: Int[Array, " n"] | None = None,
  inclusive: bool = False,
) -> Bool[Array, " n"]:
  """Returns which boxes stay.

  Args:
    boxes_xyxy: in pixels or shares. Boxes without area overlap nothing.
    scores: the higher, the surer; of equal ones the earlier box comes first. What is NaN does not
      stay.
    threshold: IoU above which a box suppresses another.
    valid: False for padding, which neither stays nor suppresses.
    groups: boxes of different groups (classes, say) do not suppress each other.
    inclusive: an IoU that equals the threshold suppresses, too, as in Detectron.
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

  def unsettled(state: tuple[Array, Array]) -> Bool[Array, ""]:
    return jnp.any(state[0] != state[1])

  start = (exists, decide(exists))
  _, keep = jax.lax.while_loop(unsettled, lambda state: (state[1], decide(state[1])), start)
  return jnp.zeros_like(keep).at[order].set(keep, unique_indices=True)


def take_best(
  scores: Float[Array, " n"], keep: Bool[Array, " n"], count: int
) -> tuple[Int[Array, " count"], Bool[Array, " count"]]:
  """Returns the indices of the `count` best of those to keep, best first, and which of them exist.

  Args:
    scores: by which they are ordered; of equal ones the earlier comes first.
    keep: what may be taken.
    count: length of the result, padded where there is less to take.
  """
  available = min(count, len(scores))
  best, index = jax.lax.top_k(jnp.where(keep, scores, -jnp.inf), available)
  exists = keep[index] & (best > -jnp.inf)
  missing = count - available
  return jnp.pad(index, (0, missing)), jnp.pad(exists, (0, missing))


@dataclasses.dataclass(frozen=True)
class ProposalLimits:
  """How many boxes the first stage hands to the second.

  Attributes:
    before_nms: the surest anchors of each level that take part in suppression.
    after_nms: the surest of what stays, of all levels together.
    nms_threshold: IoU above which the surer one suppresses.
    least_side: smaller boxes are left out; in pixels.
  """

  before_nms: int = 1000
  after_nms: int = 1000
  nms_threshold: float = 0.7
  least_side: float = 0.0

  def __post_init__(self) -> None:
    """Checks the numbers.

    Raises:
      ValueError: no box would be left.
    """
    check_positive(self, "before_nms", "after_nms")


def pick_limits(fields: Mapping[str, Any], *, train: bool) -> ProposalLimits:
  """Returns the limits for training or for use.

  Args:
    fields: of `ProposalLimits`; of two values the first is for training.
    train: which of the two is taken.

  Raises:
    ValueError: there are neither one nor two values, or one leaves no box.
  """
  chosen = {}
  for name, value in fields.items():
    pair = value if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2:
      raise ValueError(
        f"{name} of the proposals is one number, or two, for training and for use, not {value}"
      )
    chosen[name] = pair[0 if train else 1]
  return ProposalLimits(**chosen)


def choose_proposals(
  objectness: Float[Array, " n"],
  deltas: Float[Array, "n 4"],
  anchors_xyxy: Float[Array, "n 4"],
  image_size: Num[Array, " 2"],
  *,
  lengths: Sequence[int],
  limits: ProposalLimits,
  convention: Convention,
) -> tuple[Float[Array, "p 4"], Float[Array, " p"], Bool[Array, " p"]]:
  """Returns boxes, logits (best first) and existence of an image's proposals.

  Args:
    objectness: logits of the anchors.
    deltas: of the anchors.
    anchors_xyxy: of all levels, one after the other.
    image_size: height and width without padding.
    lengths: how many anchors each level has.
    limits: how many boxes are taken.
    convention: see `ops.detection_conventions`.
  """
  least = max(limits.least_side, convention.least_proposal)
  kept, start = [], 0
  for length in lengths:
    scores, index = jax.lax.top_k(
      objectness[start : start + length], min(limits.before_nms, length)
    )
    index = index + start
    boxes = decode_boxes(deltas[index], anchors_xyxy[index])
    boxes = clip_boxes(boxes, image_size, least_side=convention.least_side)
    sides = boxes[:, 2:] - boxes[:, :2]
    valid = jnp.all((sides > 0) & (sides >= least), axis=1)  # NaN is not either
    keep = non_max_suppression(
      boxes, scores, limits.nms_threshold, valid=valid, inclusive=convention.inclusive_threshold
    )
    kept.append((boxes, scores, keep))
    start += length
  boxes, scores, keep = (jnp.concatenate(parts) for parts in zip(*kept, strict=True))
  index, exists = take_best(scores, keep, limits.after_nms)
  return (
    jnp.where(exists[:, None], boxes[index], 0),
    jnp.where(exists, scores[index], -jnp.inf),
    exists,
  )


@dataclasses.dataclass(frozen=True)
class DetectionLimits:
  """Which classified boxes are finds.

  Attributes:
    least_score: of what is found at all.
    nms_threshold: IoU above which a surer find of the same class suppresses.
    max_detections: in each image.
    max_candidates: as many of the surest pairs of box and class take part in suppression. Those
      left out are the least sure: this changes nothing as long as `max_detections` stay.
    box_weights: of the deltas, see `ops.box_coding`.
  """

  least_score: float = 0.05
  nms_threshold: float = 0.5
  max_detections: int = 100
  max_candidates: int = 2000
  box_weights: Weights = (10.0, 10.0, 5.0, 5.0)


class Detections(NamedTuple):
  """Finds, the surest first."""

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
  """Returns what an image's classified proposals come to; suppression is class by class.

  Args:
    logits: of the classes and, last, of the background.
    deltas: of each proposal, by class.
    proposals_xyxy: in pixels.
    exists: False for proposals that are padding.
    image_size: height and width without padding.
    limits: what is a find.
    convention: see `ops.detection_conventions`.
  """
  probabilities = jax.nn.softmax(logits)[:, :-1]
  classes = probabilities.shape[1]
  scores = jnp.where(exists[:, None], probabilities, 0).reshape(-1)
  sure = scores > limits.least_score
  pair, candidate = take_best(scores, sure, min(limits.max_candidates, len(scores)))
  row, label, score = pair // classes, pair % classes, scores[pair]
  boxes = decode_boxes(deltas[row, label], proposals_xyxy[row], limits.box_weights)
  boxes = clip_boxes(boxes, image_size, least_side=convention.least_side)
  sides = boxes[:, 2:] - boxes[:, :2]
  keep = non_max_suppression(
    boxes,
    score,
    limits.nms_threshold,
    valid=candidate & jnp.all(sides >= convention.least_find, axis=1),
    groups=label,
    inclusive=convention.inclusive_threshold,
  )
  best, there = take_best(score, keep, limits.max_detections)
  return Detections(
    jnp.where(there[:, None], boxes[best], 0),
    jnp.where(there, score[best], 0),
    jnp.where(there, label[best], 0).astype(jnp.int32),
    there,
  )
