"""The operations that augmentation policies draw from, on uint8 images; nothing random in here.

Point operations are tables of 256 values. Blends go beyond their ends (a factor above 1) and drop
the fraction, in Pillow as in TensorFlow. What moves pixels is Pillow's: its interpolation is what
published models were trained with.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter

Pixels: TypeAlias = UInt8[np.ndarray, "h w 3"]

Color: TypeAlias = tuple[int, int, int]
"""Red, green, blue in [0, 255]."""

NEAREST, BILINEAR, BICUBIC = (
  Image.Resampling.NEAREST,
  Image.Resampling.BILINEAR,
  Image.Resampling.BICUBIC,
)

_LEVELS = np.arange(256)
_SMOOTH = ImageFilter.Kernel((3, 3), (1, 1, 1, 1, 5, 1, 1, 1, 1), scale=13)


def auto_contrast(image: Pixels) -> Pixels:
  """Stretches each channel to [0, 255]; one of a single value stays."""
  tables = []
  for channel in cv2.split(image):
    low, high, _, _ = cv2.minMaxLoc(channel)
    scale = 255.0 / (high - low) if high > low else 1.0
    offset = -low * scale if high > low else 0.0
    tables.append(_truncate(_LEVELS * scale + offset))
  return _look_up(image, np.stack(tables, axis=1))


def equalize(image: Pixels) -> Pixels:
  """Spreads the values of each channel so that their histogram is as flat as can be."""
  histograms = np.reshape(Image.fromarray(image).histogram(), (3, 256))
  return _look_up(image, np.stack([_equalizing(h) for h in histograms], axis=1))


def _equalizing(histogram: np.ndarray) -> np.ndarray:
  step = (histogram.sum() - histogram[histogram > 0][-1]) // 255
  if step == 0:
    return _LEVELS.astype(np.uint8)
  below = np.cumsum(histogram) - histogram
  return _truncate((below + step // 2) // step)


def invert(image: Pixels) -> Pixels:
  """Returns the negative."""
  return cv2.bitwise_not(image)


def posterize(image: Pixels, bits: int) -> Pixels:
  """Keeps the `bits` highest bits of each value, 0 to 8 of them."""
  return image & np.uint8(256 - (1 << (8 - bits)))


def solarize(image: Pixels, threshold: int) -> Pixels:
  """Inverts the values from `threshold` on; 256 leaves all as they are."""
  return _look_up(image, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS))


def solarize_add(image: Pixels, addition: int) -> Pixels:
  """Adds to the values below 128, up to 255."""
  return _look_up(image, np.where(_LEVELS < 128, np.minimum(_LEVELS + addition, 255), _LEVELS))


def brightness(image: Pixels, factor: float) -> Pixels:
  """Blends from black (0) to the image (1) and beyond."""
  return _look_up(image, _blend_levels(0, factor))


def contrast(image: Pixels, factor: float, grey: int | None = None) -> Pixels:
  """Blends from a grey image (0) to the image (1) and beyond.

  Args:
    image: pixels.
    factor: how far.
    grey: the level to blend from; None: the mean brightness of the image, rounded.
  """
  if grey is None:
    grey = int(np.mean(np.asarray(Image.fromarray(image).convert("L"))) + 0.5)
  return _look_up(image, _blend_levels(grey, factor))


def color(image: Pixels, factor: float) -> Pixels:
  """Blends from black and white (0) to the image (1) and beyond."""
  original = Image.fromarray(image)
  return np.asarray(Image.blend(original.convert("L").convert("RGB"), original, factor))


def sharpness(image: Pixels, factor: float) -> Pixels:
  """Blends from a slightly smoothed image (0) to the image (1) and beyond; the edge stays."""
  original = Image.fromarray(image)
  return np.asarray(Image.blend(original.filter(_SMOOTH), original, factor))


def affine(
  image: Pixels, matrix: Sequence[float | int], fill: Color, resample: Image.Resampling = NEAREST
) -> Pixels:
  """Takes pixel (x, y) from (a x + b y + c, d x + e y + f); where that lies outside, `fill`.

  Args:
    image: pixels, whose centres lie at halves: the first one at (0.5, 0.5).
    matrix: a, b, c, d, e, f.
    fill: of what comes into view.
    resample: the interpolation.
  """
  original = Image.fromarray(image)
  method = Image.Transform.AFFINE
  moved = original.transform(original.size, method, tuple(matrix), resample, fillcolor=fill)
  return np.asarray(moved)


def rotate(
  image: Pixels, degrees: float, fill: Color, resample: Image.Resampling = NEAREST
) -> Pixels:
  """Turns the image counterclockwise about its middle."""
  sine, cosine = math.sin(-math.radians(degrees)), math.cos(-math.radians(degrees))
  y, x = image.shape[0] / 2, image.shape[1] / 2
  matrix = (cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y)
  return affine(image, matrix, fill, resample)


def cutout(image: Pixels, center: tuple[int, int], half: int, fill: Color) -> Pixels:
  """Fills the square of side `2 * half` about `center` (row, column), as far as it is inside."""
  image = image.copy()
  top, left = (max(0, at - half) for at in center)
  image[top : center[0] + half, left : center[1] + half] = fill
  return image


def _blend_levels(start: int, factor: float) -> np.ndarray:
  """Returns the table of a blend from one level, in float32 as both libraries compute it."""
  return _truncate(np.float32(start) + np.float32(factor) * (_LEVELS - start).astype(np.float32))


def _truncate(levels: np.ndarray) -> np.ndarray:
  return np.clip(levels, 0, 255).astype(np.uint8)


def _look_up(image: Pixels, table: np.ndarray) -> Pixels:
  """Maps values through a table, [256] or [256 3] with one for each channel."""
  return np.asarray(cv2.LUT(image, table.astype(np.uint8).reshape(1, 256, -1)))
