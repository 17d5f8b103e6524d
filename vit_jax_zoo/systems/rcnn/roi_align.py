"""RoIAlign: crops of a feature map at a fixed size. He et al., arXiv:1703.06870, section 3.

A box is divided into size x size bins; each bin is the mean of 2 x 2 points, read with bilinear
interpolation. The two conventions differ in the position of a pixel's value:

* `aligned`: at its centre, (i + 0.5) * stride (Detectron2, torchvision's option);
* not `aligned`, the original: at i * stride; boxes have at least one map step per side, and in
  Detectron inclusive right and bottom (pass those as they are).

Points up to one step outside the map have the border's values, those further away are 0. Points of
large maps are gathered; small maps are multiplied by interpolation matrices, which is faster.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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
  in pixels of the image. For `aligned` see the module's docstring.
  """

  def multiply(features: Float[Array, "h w c"], boxes: Float[Array, "r 4"]) -> Array:
    rows, columns = _points(features.shape[:2], boxes, size, aligned=aligned)
    by_row = _interpolation(rows, features.shape[0]).astype(features.dtype)
    by_column = _interpolation(columns, features.shape[1]).astype(features.dtype)
    partial = jnp.einsum("rih,hwc->riwc", by_row, features)
    return jnp.einsum("rjw,riwc->rijc", by_column, partial)

  large = [math.prod(x.shape[1:3]) > USE_MATRICES for x in pyramid]
  result = 0.0
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
