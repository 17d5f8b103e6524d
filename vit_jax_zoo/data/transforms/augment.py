"""RandAugment of EfficientNet's TPU code and big_vision.

  Cubuk, Zoph, Shlens, Le, "RandAugment: Practical automated data augmentation with a reduced search
  space", arXiv:1909.13719

A layer draws one operation and applies it at a common magnitude M; N layers are drawn with
replacement. New pixels are grey (128), interpolation is nearest.

| operation       | at magnitude M                                                    |
|-----------------|-------------------------------------------------------------------|
| enhancements    | brightness, color, contrast, sharpness with factor 0.1 + 0.18 M   |
| posterize       | keeps 0.4 M bits; 1 for 0, 9 or more                              |
| solarize        | from (25.6 M modulo 256) on                                       |
| solarize_add    | 11 M                                                              |
| shear, rotate   | 0.03 M, 3 M degrees, either way                                   |
| translate       | 10 M pixels, either way                                           |
| cutout          | a square of side 8 M                                              |

Contrast blends with a gray level of the number of pixels / 256 (196 at 224x224) instead of the
image's mean, as in the published models' training. The table is what the code computes, not what
its authors intended. TensorFlow stores the threshold of solarize in eight bits, so that M = 10 and
20 invert the image, as M = 0 does; and it shifts a byte by at most seven bits. (Checked with
TensorFlow 2.15 and NumPy 1.23; NumPy 2 raises an error for that threshold.) Strength does not grow
with M: RandAugment(2, 0) is a strong one.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

from vit_jax_zoo.data.transforms import ImageTransform

Pixels: TypeAlias = UInt8[np.ndarray, "h w 3"]

GREY = (128, 128, 128)
_LEVELS = np.arange(256)


def auto_contrast(image: Pixels) -> Pixels:
  """Stretches each channel to [0, 255], unless it is constant."""
  tables = []
  for channel in cv2.split(image):
    low, high, _, _ = cv2.minMaxLoc(channel)
    scale = 255.0 / (high - low) if high > low else 1.0
    tables.append(_truncate(_LEVELS * scale + (-low * scale if high > low else 0.0)))
  return _look_up(image, np.stack(tables, axis=1))


def equalize(image: Pixels) -> Pixels:
  """Equalises the histogram of each channel."""
  return np.asarray(ImageOps.equalize(Image.fromarray(image)))


def invert(image: Pixels) -> Pixels:
  """Returns the negative."""
  return cv2.bitwise_not(image)


def posterize(image: Pixels, bits: int) -> Pixels:
  """Keeps the `bits` highest bits of each value, 0 to 8."""
  return image & np.uint8(256 - (1 << (8 - bits)))


def solarize(image: Pixels, threshold: int) -> Pixels:
  """Inverts values from `threshold` on; 256 inverts none."""
  return _look_up(image, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS))


def solarize_add(image: Pixels, addition: int) -> Pixels:
  """Adds to values below 128, clipped to 255."""
  return _look_up(image, np.where(_LEVELS < 128, np.minimum(_LEVELS + addition, 255), _LEVELS))


def brightness(image: Pixels, factor: float) -> Pixels:
  """Blends black (factor 0) with the image (1), and extrapolates."""
  return _look_up(image, _blend_levels(0, factor))


def contrast(image: Pixels, factor: float, grey: int) -> Pixels:
  """Blends a gray level with the image, as `brightness`."""
  return _look_up(image, _blend_levels(grey, factor))


def color(image: Pixels, factor: float) -> Pixels:
  """Blends the grayscale image with the image, as `brightness`."""
  return np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(factor))


def sharpness(image: Pixels, factor: float) -> Pixels:
  """Blends a smoothed image with the image, as `brightness`."""
  return np.asarray(ImageEnhance.Sharpness(Image.fromarray(image)).enhance(factor))


def affine(image: Pixels, matrix: Sequence[float | int]) -> Pixels:
  """Reads pixel (x, y) at (a x + b y + c, d x + e y + f), grey outside; centers are at halves."""
  original, method = Image.fromarray(image), Image.Transform.AFFINE
  options = {"resample": Image.Resampling.NEAREST, "fillcolor": GREY}
  return np.asarray(original.transform(original.size, method, tuple(matrix), **options))


def rotate(image: Pixels, degrees: float) -> Pixels:
  """Rotates the image counterclockwise about its center."""
  sine, cosine = math.sin(-math.radians(degrees)), math.cos(-math.radians(degrees))
  y, x = image.shape[0] / 2, image.shape[1] / 2
  matrix = (cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y)
  return affine(image, matrix)


def cutout(image: Pixels, center: tuple[int, int], half: int) -> Pixels:
  """Greys the square of side `2 * half` about `center` (row, column), clipped to the image."""
  image = image.copy()
  top, left = (max(0, at - half) for at in center)
  image[top : center[0] + half, left : center[1] + half] = GREY
  return image


def _blend_levels(start: int, factor: float) -> np.ndarray:
  """Returns the lookup table of a blend with one level, in float32 as in TensorFlow."""
  return _truncate(np.float32(start) + np.float32(factor) * (_LEVELS - start).astype(np.float32))


def _truncate(levels: np.ndarray) -> np.ndarray:
  return np.clip(levels, 0, 255).astype(np.uint8)


def _look_up(image: Pixels, table: np.ndarray) -> Pixels:
  return np.asarray(cv2.LUT(image, table.astype(np.uint8).reshape(1, 256, -1)))


_MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_ENHANCEMENTS = ("brightness", "color", "contrast", "sharpness")
_OPERATIONS: dict[str, Callable[..., Pixels]] = {
  function.__name__: function
  for function in (
    auto_contrast, equalize, invert, posterize, solarize, solarize_add, brightness, color, contrast,
    sharpness,
  )
}  # fmt: skip


def _move(image: Pixels, kind: str, strength: float) -> Pixels:
  """Moves pixels by `strength` times 30 degrees, a shear of 0.3, or 100 pixels."""
  if kind == "rotate":
    return rotate(image, 30 * strength)
  shear, shift = 0.3 * strength, 100.0 * strength
  start = -0.5 * shear  # TensorFlow shears about the center of the first pixel, Pillow its corner
  matrix = {
    "shear_x": (1, shear, start, 0, 1, 0),
    "shear_y": (1, 0, 0, shear, 1, start),
    "translate_x": (1, 0, shift, 0, 1, 0),
    "translate_y": (1, 0, 0, 0, 1, shift),
  }[kind]
  return affine(image, matrix)


@dataclasses.dataclass(frozen=True)
class RandAugment(ImageTransform):
  """RandAugment on `image`, big_vision's `randaug(N,M)`, within one level of TensorFlow."""

  operations: ClassVar[tuple[str, ...]] = (
    "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add",
    "color", "contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x",
    "translate_y", "cutout",
  )  # fmt: skip

  num_layers: int = 2  # N, number of operations
  magnitude: float | int = 10  # M

  def __post_init__(self) -> None:
    self.check("num_layers", self.num_layers >= 1, "at least 1")
    self.check("magnitude", 0 <= self.magnitude <= 30, "[0, 30]")

  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if image.dtype != np.uint8:
      remedy = "put it before transforms with dtype='float32'"
      raise ValueError(f"{self.name}: expected uint8 images, got {image.dtype}; {remedy}")
    for _ in range(self.num_layers):
      image = self.apply_layer(image, self.operations[rng.integers(len(self.operations))], rng)
    return image

  def apply_layer(self, image: Pixels, operation: str, rng: np.random.Generator) -> Pixels:
    """Returns the image after one operation."""
    strength = self.magnitude / 10
    if operation in _MOVES:
      return _move(image, operation, strength if rng.random() < 0.5 else -strength)
    if operation == "cutout":
      center = (int(rng.integers(image.shape[0])), int(rng.integers(image.shape[1])))
      return cutout(image, center, int(strength * 40))
    factor, bits = 0.1 + 1.8 * strength, int(strength * 4)
    arguments = {
      **dict.fromkeys(_ENHANCEMENTS, (factor,)),
      "contrast": (factor, min(255, image.shape[0] * image.shape[1] // 256)),
      "posterize": (bits if 0 < bits <= 8 else 1,),
      "solarize": (int(strength * 256) % 256,),
      "solarize_add": (int(strength * 110),),
    }
    return _OPERATIONS[operation](image, *arguments.get(operation, ()))
