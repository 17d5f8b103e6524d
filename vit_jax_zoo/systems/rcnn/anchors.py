"""Anchors: the boxes that a region proposal network starts from, alike at every place of a map.

Ren et al., arXiv:1506.01497, section 3.1; one size for each level of a pyramid: Lin et al.,
arXiv:1612.03144, section 4.1. Boxes are (left, top, right, bottom) in pixels of the image, right
and bottom behind the last pixel.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

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


def cell_anchors(
  stride: int,
  sizes: Sequence[float | int],
  aspect_ratios: Sequence[float | int],
  *,
  convention: str = "torchvision",
) -> Float[np.ndarray, "a 4"]:
  """Returns the anchors of a map's first place: all sizes of one ratio before the next ratio.

  In Detectron2 it is all ratios of one size before the next size. (Most networks have one size for
  each level; with more, the order tells which output of the first stage is which anchor's.)

  Args:
    stride: pixels between two places.
    sizes: square root of the anchors' area, in pixels.
    aspect_ratios: height / width.
    convention: "torchvision": around the corner of the image, corners rounded to whole pixels;
      "detectron2": the same without rounding; "detectron": around the middle of the first
      stride x stride pixels, sides rounded for an anchor of that size and then scaled, so that
      areas differ a little from ratio to ratio.
  """
  ratios = np.asarray(aspect_ratios, np.float64)[:, None]
  scales = np.asarray(sizes, np.float64)[None]
  if convention == "detectron":
    widths = np.round(np.sqrt(stride * stride / ratios))
    heights = np.round(widths * ratios)
    half = np.stack([scales / stride * widths, scales / stride * heights], axis=-1)
    half = half.reshape(-1, 2) / 2
    # The middle of pixels 0 ... stride - 1 where a pixel's place is its own middle; then the box
    # ends on a pixel, here behind it.
    center = (stride - 1) / 2
    return np.concatenate([center - half + 0.5, center + half + 0.5], axis=1)
  roots = np.sqrt(ratios)
  half = np.stack([scales / roots, scales * roots], axis=-1)
  half = (half.swapaxes(0, 1) if convention == "detectron2" else half).reshape(-1, 2) / 2
  anchors = np.concatenate([-half, half], axis=1)
  return np.round(anchors) if convention == "torchvision" else anchors


def anchor_steps(
  map_sizes: Sequence[tuple[int, int]],
  strides: Sequence[int],
  own_levels: int,
  *,
  convention: str = "torchvision",
) -> list[tuple[int, int]]:
  """Returns the pixels between two rows and between two columns of each level's anchors.

  They are the strides, except beyond the backbone in torchvision: that divides the image's sides by
  the map's, rounded down, so that after an odd side, halved and rounded up, places lie closer.

  Args:
    map_sizes: heights and widths, finest level first.
    strides: of the levels.
    own_levels: how many of them are the backbone's.
    convention: see `cell_anchors`.
  """
  steps = [(stride, stride) for stride in strides]
  if convention != "torchvision":
    return steps
  height, width = (side * strides[own_levels - 1] for side in map_sizes[own_levels - 1])
  return steps[:own_levels] + [(height // h, width // w) for h, w in map_sizes[own_levels:]]


def grid_anchors(
  cell: Float[np.ndarray, "a 4"], map_size: tuple[int, int], stride: int | tuple[int, int]
) -> Float[Array, "n 4"]:
  """Returns the anchors of all places of a map: row by row, and those of one place together.

  Args:
    cell: as `cell_anchors` gives them.
    map_size: height and width.
    stride: pixels between two places; or between two rows and between two columns.
  """
  steps = (stride, stride) if isinstance(stride, int) else stride
  rows, columns = (
    jnp.arange(side, dtype=jnp.float32) * step for side, step in zip(map_size, steps, strict=True)
  )
  y, x = jnp.meshgrid(rows, columns, indexing="ij")
  shift = jnp.stack([x, y, x, y], axis=-1)[:, :, None]
  return (shift + jnp.asarray(cell, jnp.float32)[None, None]).reshape(-1, 4)


def pyramid_anchors(
  cells: Sequence[Float[np.ndarray, "a 4"]],
  map_sizes: Sequence[tuple[int, int]],
  strides: Sequence[int],
  own_levels: int,
  *,
  convention: str = "torchvision",
) -> list[Float[Array, "_ 4"]]:
  """Returns the anchors of every level of a pyramid, from fine to coarse.

  Args:
    cells: of each level, as `cell_anchors` gives them.
    map_sizes: see `anchor_steps`.
    strides: see `anchor_steps`.
    own_levels: see `anchor_steps`.
    convention: see `anchor_steps`.
  """
  steps = anchor_steps(map_sizes, strides, own_levels, convention=convention)
  levels = zip(cells, map_sizes, steps, strict=True)
  return [grid_anchors(cell, size, step) for cell, size, step in levels]


def inside_images(
  anchors_xyxy: Float[Array, "n 4"], image_size: Num[Array, "b 2"]
) -> Bool[Array, "b n"]:
  """Returns which anchors do not cross the border of each image; sizes are heights and widths."""
  limits = image_size.astype(anchors_xyxy.dtype)[:, None, ::-1]
  starts = jnp.all(anchors_xyxy[:, :2] >= 0, axis=1)[None]
  return starts & jnp.all(anchors_xyxy[None, :, 2:] <= limits, axis=2)
