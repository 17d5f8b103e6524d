"""Anchors: the boxes that a region proposal network starts from, alike at every place of a map.

Ren et al., arXiv:1506.01497, section 3.1; one size for each level of a pyramid: Lin et al.,
arXiv:1612.03144, section 4.1. Boxes are (left, top, right, bottom) in pixels of the image, right
and bottom behind the last pixel.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num


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
