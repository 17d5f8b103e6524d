"""Boxes as changes of other boxes: what a detector of proposals predicts.

Girshick et al., arXiv:1311.2524, appendix C, Eq. 1 to 4. All boxes are (left, top, right, bottom),
right and bottom behind the last pixel.

Detectron's boxes end on their last pixel instead, so that its formulas have + 1 and - 1 in many
places. With 1 added to right and bottom once, all of them become the ones below; `inclusive` and
`exclusive` do that at the border to such data.
"""

import math
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

Weights: TypeAlias = tuple[float | int, float | int, float | int, float | int]
"""What the four deltas are multiplied by, so that a network has to learn numbers of order 1."""

LOG_SIZE_LIMIT = math.log(1000 / 16)
"""The largest growth, as a logarithm, that a delta may bring about."""

_LEAST_SIDE = 1e-6  # pixels: boxes without a side (in padding) are coded by finite numbers


def encode_boxes(
  boxes_xyxy: Float[Array, "*#n 4"],
  references_xyxy: Float[Array, "*#n 4"],
  weights: Weights = (1, 1, 1, 1),
) -> Float[Array, "*#n 4"]:
  """Returns the deltas that take the references to the boxes.

  (x - x_r) / w_r, (y - y_r) / h_r, log(w / w_r), log(h / h_r), times the weights; x and y are
  centres.
  """
  center, size = _center_size(boxes_xyxy)
  reference_center, reference_size = _center_size(references_xyxy)
  reference_size = jnp.maximum(reference_size, _LEAST_SIDE)
  shift = (center - reference_center) / reference_size
  growth = jnp.log(jnp.maximum(size, _LEAST_SIDE) / reference_size)
  deltas = jnp.concatenate([shift, growth], axis=-1)
  return deltas * _expanded(weights, deltas)


def decode_boxes(
  deltas: Float[Array, "*#n 4"],
  references_xyxy: Float[Array, "*#n 4"],
  weights: Weights = (1, 1, 1, 1),
) -> Float[Array, "*#n 4"]:
  """Returns the boxes that the deltas make of the references; the inverse of `encode_boxes`.

  A growth of more than 1000/16 counts as that: early in training exp would overflow.
  """
  deltas = deltas / _expanded(weights, deltas)
  reference_center, reference_size = _center_size(references_xyxy)
  center = reference_center + deltas[..., :2] * reference_size
  half = 0.5 * reference_size * jnp.exp(jnp.minimum(deltas[..., 2:], LOG_SIZE_LIMIT))
  return jnp.concatenate([center - half, center + half], axis=-1)


def clip_boxes(
  boxes_xyxy: Float[Array, "*b n 4"],
  image_size: Num[Array, "*b 2"],
  *,
  least_side: float | int = 0,
) -> Float[Array, "*b n 4"]:
  """Returns the boxes' parts inside the images.

  Args:
    boxes_xyxy: in pixels.
    image_size: height and width in pixels.
    least_side: what is left of a box beside the image. Detectron's clipping leaves 1 pixel, the
      nearest one; others nothing.
  """
  height, width = jnp.moveaxis(image_size.astype(boxes_xyxy.dtype), -1, 0)
  limits = jnp.stack([width, height], axis=-1)[..., None, :]
  low = jnp.clip(boxes_xyxy[..., :2], 0, limits - least_side)
  high = jnp.clip(boxes_xyxy[..., 2:], least_side, limits)
  return jnp.concatenate([low, high], axis=-1)


def inclusive(boxes_xyxy: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
  """Returns boxes that end on their last pixel, as Detectron has them."""
  return jnp.concatenate([boxes_xyxy[..., :2], boxes_xyxy[..., 2:] - 1], axis=-1)


def exclusive(inclusive_xyxy: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
  """Returns boxes that end behind their last pixel; the inverse of `inclusive`."""
  return jnp.concatenate([inclusive_xyxy[..., :2], inclusive_xyxy[..., 2:] + 1], axis=-1)


def _center_size(
  boxes_xyxy: Float[Array, "*n 4"],
) -> tuple[Float[Array, "*n 2"], Float[Array, "*n 2"]]:
  size = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
  return boxes_xyxy[..., :2] + 0.5 * size, size


def _expanded(weights: Weights, deltas: Float[Array, "*n 4"]) -> Float[Array, "*ones 4"]:
  return jnp.asarray(weights, deltas.dtype).reshape((1,) * (deltas.ndim - 1) + (4,))
