"""Box formats and intersection over union.

`boxes_cxcywh` are (centre x, centre y, width, height), `boxes_xyxy` (left, top, right, bottom), in
pixels or relative to the image's sides.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

_NO_AREA = 1e-12  # one pixel of a 4,000 x 4,000 image is 6e-8 of it


def cxcywh_to_xyxy(boxes_cxcywh: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
  """Returns the corners of boxes given by centre and size."""
  center, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
  return jnp.concatenate([center - 0.5 * size, center + 0.5 * size], axis=-1)


def box_area(boxes_xyxy: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
  """Returns the areas; 0 for boxes with a negative side."""
  sides = jnp.maximum(boxes_xyxy[..., 2:] - boxes_xyxy[..., :2], 0)
  return sides[..., 0] * sides[..., 1]


def generalized_iou(
  a_xyxy: Float[Array, "*#n 4"], b_xyxy: Float[Array, "*#n 4"]
) -> Float[Array, "*#n"]:
  """Returns the elementwise generalized IoU, in [-1, 1].

  IoU - (hull - union) / hull, where hull is the smallest box around both. Rezatofighi et al.,
  arXiv:1902.09630, algorithm 1. Value and gradient are finite for empty boxes, too.
  """
  overlap, union = _overlap(a_xyxy, b_xyxy)
  low = jnp.minimum(a_xyxy[..., :2], b_xyxy[..., :2])
  high = jnp.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:])
  hull = box_area(jnp.concatenate([low, high], axis=-1))
  return overlap - _divide(hull - union, hull)


def pairwise_iou(
  a_xyxy: Float[Array, "*b n 4"], b_xyxy: Float[Array, "*b m 4"]
) -> Float[Array, "*b n m"]:
  """Returns the IoU in [0, 1] of all pairs; 0, without gradient, for two empty boxes."""
  return _overlap(a_xyxy[..., :, None, :], b_xyxy[..., None, :, :])[0]


def _overlap(
  a_xyxy: Float[Array, "*#n 4"], b_xyxy: Float[Array, "*#n 4"]
) -> tuple[Float[Array, "*#n"], Float[Array, "*#n"]]:
  low = jnp.maximum(a_xyxy[..., :2], b_xyxy[..., :2])
  high = jnp.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:])
  intersection = box_area(jnp.concatenate([low, high], axis=-1))
  union = box_area(a_xyxy) + box_area(b_xyxy) - intersection
  return _divide(intersection, union), union


def _divide(part: Float[Array, "*n"], whole: Float[Array, "*n"]) -> Float[Array, "*n"]:
  """Returns part / whole, 0 with a finite gradient where whole is 0."""
  exists = whole > _NO_AREA
  return jnp.where(exists, part / jnp.where(exists, whole, 1), 0)
