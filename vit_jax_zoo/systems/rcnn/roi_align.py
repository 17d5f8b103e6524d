"""RoIAlign: crops of a feature map at a fixed size. He et al., arXiv:1703.06870, section 3.

A box is divided into size x size bins; each bin is the mean of samples x samples points, read with
bilinear interpolation. The two conventions differ in the position of a pixel's value:

* `aligned`: at its centre, (i + 0.5) * stride (Detectron2, torchvision's option);
* not `aligned`, the original: at i * stride; boxes have at least one map step per side, and in
  Detectron inclusive right and bottom (pass those as they are).

Points up to one step outside the map have the border's values, those further away are 0.

Bilinear interpolation is separable, which allows two implementations: gathering four neighbours per
point, or multiplying the map by an interpolation matrix from each side. The second is faster for
small maps, and the only one for a number of samples that depends on the box; see `USE_MATRICES`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

USE_MATRICES = 1024
"""Maximum number of map positions for interpolation matrices; larger maps are gathered from."""

USE_MATRICES_FOR_MASKS = 128**2
"""The same for masks, which have one channel."""


_ROUNDING = 1e-4  # map steps: boxes often end exactly at the limit of one step


class _Points(NamedTuple):
  """Sample points of every box along one axis, in map steps."""

  at: Float[Array, "r size samples"]
  weight: Float[Array, "r size samples"]  # weight in the bin's mean; 0 outside the map


def roi_align(
  features: Float[Array, "h w c"],
  boxes_xyxy: Float[Array, "r 4"],
  *,
  stride: float | int,
  size: int,
  samples: int = 2,
  aligned: bool = True,
) -> Float[Array, "r size size c"]:
  """Returns the crop of each box.

  Args:
    features: feature map of one image.
    boxes_xyxy: boxes in pixels of the image.
    stride: stride of the map in pixels.
    size: side of the crops.
    samples: points along each side of a bin; 0: as many as map steps in the bin, rounded up, per
      box (limited to twice the map); an empty `aligned` box then has no points and a zero crop.
    aligned: see the module's docstring.
  """
  side = (features.shape[0], features.shape[1])
  rows, columns = _points(side, boxes_xyxy / stride, size, samples, aligned=aligned)
  if samples == 0 or math.prod(features.shape[:2]) <= USE_MATRICES:
    return _multiplied(features, rows, columns)
  return _gathered(features, rows, columns)


def box_levels(
  boxes_xyxy: Float[Array, "*r 4"],
  levels: tuple[int, int],
  *,
  canonical_size: float | int = 224,
  canonical_level: int = 4,
) -> Int[Array, "*r"]:
  """Returns the pyramid level to crop each box from. Lin et al., arXiv:1612.03144, Eq. 1.

  floor(canonical_level + log2(sqrt(area) / canonical_size + 1e-6)), clipped to `levels`.

  Args:
    boxes_xyxy: boxes in pixels.
    levels: finest and coarsest level; level l has stride 2^l.
    canonical_size: side of boxes of `canonical_level` (ImageNet's 224).
    canonical_level: level of single-scale detectors.
  """
  sides = jnp.maximum(boxes_xyxy[..., 2:] - boxes_xyxy[..., :2], 0)
  share = jnp.sqrt(sides[..., 0] * sides[..., 1]) / canonical_size
  level = jnp.floor(canonical_level + jnp.log2(share + 1e-6))
  return jnp.clip(level, *levels).astype(jnp.int32)


def pyramid_roi_align(
  pyramid: Sequence[Float[Array, "b _ _ c"]],
  boxes_xyxy: Float[Array, "b r 4"],
  level_index: Int[Array, "b r"],
  *,
  strides: Sequence[int],
  size: int,
  samples: int = 2,
  aligned: bool = True,
) -> Float[Array, "b r size size c"]:
  """Returns the crops of boxes, each from one level of the pyramid.

  Args:
    pyramid: maps, finest first.
    boxes_xyxy: boxes in pixels of the image.
    level_index: index of each box's map.
    strides: strides of the maps.
    size: see `roi_align`.
    samples: see `roi_align`; at least 1 for maps of more than `USE_MATRICES` positions.
    aligned: see `roi_align`.
  """
  large = [math.prod(x.shape[1:3]) > USE_MATRICES and samples > 0 for x in pyramid]
  fields: dict[str, Any] = {"size": size, "samples": samples, "aligned": aligned}
  result = 0.0
  for index, (features, stride) in enumerate(zip(pyramid, strides, strict=True)):
    if not large[index]:
      crops = _each_image(features, boxes_xyxy, stride=stride, **fields)
      result = result + jnp.where(_to_crops(level_index == index), crops, 0)
  if any(large):
    gathered = [(x, s) for x, s, is_large in zip(pyramid, strides, large, strict=True) if is_large]
    place = jnp.cumsum(jnp.asarray(large, jnp.int32)) - 1
    crops = _gathered_from_one(gathered, boxes_xyxy, place[level_index], **fields)
    result = result + jnp.where(_to_crops(jnp.asarray(large)[level_index]), crops, 0)
  return jnp.asarray(result)


def every_level_roi_align(
  pyramid: Sequence[Float[Array, "b _ _ c"]],
  boxes_xyxy: Float[Array, "b r 4"],
  *,
  strides: Sequence[int],
  size: int,
  samples: int = 2,
  aligned: bool = True,
) -> list[Float[Array, "b r size size c"]]:
  """Returns the crops of boxes from every level. Liu et al., arXiv:1803.01534, section 3.2."""
  fields: dict[str, Any] = {"size": size, "samples": samples, "aligned": aligned}
  return [
    _each_image(features, boxes_xyxy, stride=stride, **fields)
    for features, stride in zip(pyramid, strides, strict=True)
  ]


def crop_masks(
  masks: Bool[Array, "t h w"],
  index: Int[Array, " r"],
  boxes_xyxy: Float[Array, "r 4"],
  size: int,
) -> Bool[Array, "r size size"]:
  """Returns crops of masks, the targets of a mask head.

  Args:
    masks: masks of an image's objects.
    index: index of each box's mask.
    boxes_xyxy: boxes in pixels of the masks.
    size: side of the crops. A bin is True if at least half of its 2 x 2 points are.
  """
  height, width = masks.shape[1:]
  rows, columns = _points((height, width), boxes_xyxy, size, 2, aligned=True)
  if height * width <= USE_MATRICES_FOR_MASKS:
    by_row, by_column = _interpolation(rows, height), _interpolation(columns, width)
    crops = jnp.einsum("rih,rhw,rjw->rij", by_row, masks[index].astype(by_row.dtype), by_column)
  else:
    table = masks.reshape(-1, 1).astype(jnp.float32)
    shape = jnp.broadcast_to(jnp.asarray([height, width], jnp.int32), (len(index), 2))
    crops = _interpolate(table, index * (height * width), shape, rows, columns)[..., 0]
  return crops >= 0.5


def _each_image(
  features: Float[Array, "b h w c"], boxes_xyxy: Float[Array, "b r 4"], **fields: Any
) -> Float[Array, "b r size size c"]:
  return jax.vmap(lambda x, boxes: roi_align(x, boxes, **fields))(features, boxes_xyxy)


def _to_crops(chosen: Array) -> Array:
  return chosen[..., None, None, None]


def _points(
  map_size: tuple[int, int],
  boxes: Float[Array, "r 4"],
  size: int,
  samples: int,
  *,
  aligned: bool,
) -> tuple[_Points, _Points]:
  """Returns the sample points along rows and columns."""
  start = boxes[:, :2] - (0.5 if aligned else 0.0)
  extent = boxes[:, 2:] - boxes[:, :2]
  if not aligned:
    extent = jnp.maximum(extent, 1.0)
  along = [
    _points_along(side, start[:, axis], extent[:, axis], size, samples)
    for side, axis in zip(map_size, (1, 0), strict=True)
  ]
  return along[0], along[1]


def _points_along(
  side: int,
  start: Float[Array, " r"],
  extent: Float[Array, " r"],
  size: int,
  samples: int,
) -> _Points:
  bin_extent = extent / size
  if samples:
    most = samples
    taken = count = jnp.full_like(extent, samples)
  else:
    most = -(-2 * side // size)
    taken = jnp.clip(jnp.ceil(bin_extent), 0, most)
    count = jnp.maximum(taken, 1)  # what is divided by
  bins = jnp.arange(size, dtype=extent.dtype)
  point = jnp.arange(most, dtype=extent.dtype)
  share = (point + 0.5)[None, None] / count[:, None, None]
  at = start[:, None, None] + (bins[None, :, None] + share) * bin_extent[:, None, None]
  counts = (
    (at >= -1 - _ROUNDING) & (at <= side + _ROUNDING) & (point[None, None] < taken[:, None, None])
  )
  weight = jnp.where(counts, 1 / count[:, None, None], 0)
  return _Points(jnp.clip(at, 0, side - 1), weight)


def _multiplied(
  features: Float[Array, "h w c"], rows: _Points, columns: _Points
) -> Float[Array, "r size size c"]:
  by_row = _interpolation(rows, features.shape[0]).astype(features.dtype)
  by_column = _interpolation(columns, features.shape[1]).astype(features.dtype)
  partial = jnp.einsum("rih,hwc->riwc", by_row, features)
  return jnp.einsum("rjw,riwc->rijc", by_column, partial)


def _interpolation(points: _Points, side: int) -> Float[Array, "r size side"]:
  """Returns the weight of each map position in each bin."""
  distance = jnp.abs(
    points.at[..., None] - jnp.arange(side, dtype=points.at.dtype)[None, None, None]
  )
  return jnp.sum(points.weight[..., None] * jnp.maximum(1 - distance, 0), axis=2)


def _gathered(
  features: Float[Array, "h w c"], rows: _Points, columns: _Points
) -> Float[Array, "r size size c"]:
  height, width, channels = features.shape
  boxes = len(rows.at)
  table = features.reshape(height * width, channels)
  offset = jnp.zeros(boxes, jnp.int32)
  shape = jnp.broadcast_to(jnp.asarray([height, width], jnp.int32), (boxes, 2))
  return _interpolate(table, offset, shape, rows, columns)


def _interpolate(
  table: Float[Array, "n c"],
  offset: Int[Array, " r"],
  map_size: Int[Array, "r 2"],
  rows: _Points,
  columns: _Points,
) -> Float[Array, "r size size c"]:
  """Returns the bins' means by gathering four neighbours per point.

  Args:
    table: positions of one or more maps, in row-major order.
    offset: offset in the table of each box's map.
    map_size: height and width of each box's map.
    rows: sample points along the rows.
    columns: sample points along the columns.
  """
  boxes, size, samples = rows.at.shape
  flat = (boxes, size * samples)
  y, x = rows.at.reshape(flat), columns.at.reshape(flat)
  y_weight, x_weight = rows.weight.reshape(flat), columns.weight.reshape(flat)
  result = 0.0
  for y_index, y_share in _neighbours(y, map_size[:, 0]):
    for x_index, x_share in _neighbours(x, map_size[:, 1]):
      index = y_index[:, :, None] * map_size[:, 1, None, None] + x_index[:, None]
      weight = (y_weight * y_share)[:, :, None] * (x_weight * x_share)[:, None]
      values = table[index + offset[:, None, None]]
      result = result + values * weight.astype(table.dtype)[..., None]
  bins = jnp.asarray(result).reshape(boxes, size, samples, size, samples, -1)
  return jnp.sum(bins, axis=(2, 4))


def _neighbours(
  at: Float[Array, "r p"], side: Int[Array, " r"]
) -> list[tuple[Int[Array, "r p"], Float[Array, "r p"]]]:
  """Returns the positions before and after each point with their weights."""
  low = jnp.floor(at)
  share = at - low
  index = low.astype(jnp.int32)
  return [(index, 1 - share), (jnp.minimum(index + 1, side[:, None] - 1), share)]


def _gathered_from_one(
  levels: Sequence[tuple[Float[Array, "b _ _ c"], int]],
  boxes_xyxy: Float[Array, "b r 4"],
  level_index: Int[Array, "b r"],
  *,
  size: int,
  samples: int,
  aligned: bool,
) -> Float[Array, "b r size size c"]:
  """Gathers each box's points from its level, out of one table of all levels.

  Args:
    levels: maps and their strides.
    boxes_xyxy: boxes in pixels of the image.
    level_index: index into `levels` of each box; clipped.
    size: see `roi_align`.
    samples: see `roi_align`; at least 1.
    aligned: see `roi_align`.
  """
  batch, channels = levels[0][0].shape[0], levels[0][0].shape[-1]
  table = jnp.concatenate([x.reshape(batch, -1, channels) for x, _ in levels], axis=1)
  shapes = [(x.shape[1], x.shape[2]) for x, _ in levels]
  lengths = [math.prod(shape) for shape in shapes]
  offsets = jnp.asarray([sum(lengths[:i]) for i in range(len(levels))], jnp.int32)

  def one_image(
    table: Float[Array, "n c"], boxes: Float[Array, "r 4"], index: Int[Array, " r"]
  ) -> Float[Array, "r size size c"]:
    points = [
      _points(shape, boxes / stride, size, samples, aligned=aligned)
      for shape, (_, stride) in zip(shapes, levels, strict=True)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *points)
    each = jnp.arange(len(index))
    rows, columns = jax.tree.map(lambda leaf: leaf[index, each], stacked)
    map_size = jnp.asarray(shapes, jnp.int32)[index]
    return _interpolate(table, offsets[index], map_size, rows, columns)

  index = jnp.clip(level_index, 0, len(levels) - 1)
  return jax.vmap(one_image)(table, boxes_xyxy, index)
