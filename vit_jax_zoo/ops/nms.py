"""Non-maximum suppression in fixed shapes: of boxes that cover the same thing, the surest stays.

Greedy, as everybody defines it: the surest box stays and suppresses those that it overlaps; of the
others the surest stays, and so on. Here all boxes decide at once, in rounds: a box stays unless a
surer one that stays (as far as is known) overlaps it. After k rounds the k surest are right, and
when a round changes nothing all are: the result is the greedy one, exactly, while a round is one
pass over a matrix and a handful of rounds are enough for real boxes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vit_jax_zoo.ops.boxes import pairwise_iou


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
