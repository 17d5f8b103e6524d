"""Bit-exact `tf.image.resize` in numpy, with which published accuracies were measured.

The pipelines of the published models cast the result to uint8 by dropping the fraction, so a single
rounding error becomes one grey level: on a white background, in half of the pixels. Hence the
float32 operations are in TensorFlow's order (core/kernels/image: resize_bilinear_op, resize_area_op
and scale_and_translate_op), unlike OpenCV's.
"""

import functools
from typing import TypeAlias

import numpy as np
from jaxtyping import Float32, Int, UInt8

from vit_jax_zoo.errors import unknown_name

Pixels: TypeAlias = Float32[np.ndarray, "h w c"] | UInt8[np.ndarray, "h w c"]

METHODS = ("bilinear", "area", "antialias")

_cached = functools.lru_cache(256)  # of neighbours and weights, by (old size, new size)
_ONE, _HALF = np.float32(1), np.float32(0.5)


def tf_resize(
  image: Pixels, height: int, width: int, method: str = "bilinear"
) -> Float32[np.ndarray, "H W c"]:
  """Resizes an image, in [0, 255], as `tf.image.resize` does, without rounding.

  "bilinear" interpolates the four nearest pixels, at half-pixel centres, so that a large image
  shrinks to a scatter of its pixels; it is TensorFlow's default. "area" is the mean of the covered
  area. "antialias" is bilinear with a triangle as wide as the shrinkage.
  """
  image = image.astype(np.float32)
  if method == "bilinear":
    return _bilinear(image, height, width)
  if method == "antialias":
    rows = _weighted_sum(image, *_triangle(image.shape[0], height), axis=0)
    return _weighted_sum(rows, *_triangle(image.shape[1], width), axis=1)
  if method == "area":
    columns = _weighted_sum(image, *_cover(image.shape[1], width), axis=1)
    total = _weighted_sum(columns, *_cover(image.shape[0], height), axis=0)
    # The area in float32, its inverse in double: the kernel divides the literal 1.0.
    area = _scale(image.shape[0], height) * _scale(image.shape[1], width)
    return total * np.float32(1.0 / float(area))
  raise ValueError(unknown_name("resize method", method, METHODS))


def _scale(old: int, new: int) -> np.float32:
  return np.float32(old) / np.float32(new)


def _bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
  top, bottom, y = _neighbours(image.shape[0], height)
  left, right, x = _neighbours(image.shape[1], width)
  x, y = x[None, :, None], y[:, None, None]
  # Only the rows that are needed, each interpolated once.
  rows, where = np.unique(np.concatenate([top, bottom]), return_inverse=True)
  image = image[rows]
  first = image[:, left]
  image = first + (image[:, right] - first) * x
  upper = image[where[:height]]
  return upper + (image[where[height:]] - upper) * y


@_cached
def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the lower and the upper neighbour of each new centre, and the upper one's weight."""
  centres = (np.arange(new, dtype=np.float32) + _HALF) * _scale(old, new) - _HALF
  floor, ceiling = np.floor(centres), np.ceil(centres)
  lower, upper = (np.clip(i, 0, old - 1).astype(np.int64) for i in (floor, ceiling))
  return lower, upper, np.asarray(centres - floor)


def _weighted_sum(
  image: np.ndarray,
  starts: Int[np.ndarray, "new"],
  weights: Float32[np.ndarray, "new taps"],
  axis: int,
) -> np.ndarray:
  """Sums, tap by tap, `weights[i, k]` times the pixel `starts[i] + k` of an axis."""
  shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
  total = np.zeros((), np.float32)
  for tap in range(weights.shape[1]):
    indices = np.minimum(starts + tap, image.shape[axis] - 1)
    total = np.add(total, image.take(indices, axis) * weights[:, tap].reshape(shape))
  return total


@_cached
def _cover(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the first pixel of the interval [i, i + 1) * old/new, and the covered fractions."""
  scale = _scale(old, new)
  begin = np.arange(new, dtype=np.float32) * scale
  end = np.arange(1, new + 1, dtype=np.float32) * scale
  starts = np.floor(begin).astype(np.int64)
  counts = np.ceil(end).astype(np.int64) - starts
  pixels = (starts[:, None] + np.arange(counts.max())).astype(np.float32)
  begin, end = begin[:, None], end[:, None]
  inside = np.where(pixels + _ONE > end, end - pixels, _ONE)
  first = np.where(pixels + _ONE > end, scale, pixels + _ONE - begin)
  weights = np.where(pixels < begin, first, inside)
  return starts, np.where(np.arange(counts.max()) < counts[:, None], weights, np.float32(0))


@_cached
def _triangle(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the first pixel below a triangle around each new centre, and the pixels' weights."""
  inverse_scale = _ONE / (np.float32(new) / np.float32(old))
  radius = max(inverse_scale, _ONE)
  centres = (np.arange(new, dtype=np.float32) + _HALF) * inverse_scale
  starts = np.maximum(np.ceil(centres - radius - _HALF), 0).astype(np.int64)
  stops = np.minimum(np.floor(centres + radius - _HALF), old - 1).astype(np.int64) + 1
  taps = np.arange((stops - starts).max())
  distance = (starts[:, None] + taps).astype(np.float32) + _HALF - centres[:, None]
  weights = np.maximum(_ONE - np.abs(distance * (_ONE / radius)), np.float32(0))
  weights = np.where(taps < (stops - starts)[:, None], weights, np.float32(0))
  total = np.zeros(new, np.float32)
  for tap in taps:
    total += weights[:, tap]
  return starts, weights * (_ONE / total)[:, None]
