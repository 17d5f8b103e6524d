"""Random erasing, and RandAugment in the two variants of published models.

  Cubuk, Zoph, Shlens, Le, "RandAugment: Practical automated data augmentation with a reduced search
  space", arXiv:1909.13719

A layer draws one operation and applies it at a common magnitude M, in tenths of a range; N layers
are drawn with replacement. The rest differs between the implementations:

|                 | `rand_augment`                       | `timm_rand_augment`               |
|-----------------|--------------------------------------|-----------------------------------|
| source          | EfficientNet's TPU code; big_vision  | timm: `rand-m9-mstd0.5-inc1`      |
| operations      | 16                                   | 15: no cutout                     |
| a layer acts    | always                               | with probability 0.5              |
| magnitude       | M, also above 10 (AugReg has 20)     | normal about M, cut to [0, 10]    |
| enhancements    | 0.1 + 0.18 M                         | 1 +- 0.09 M, at least 0.1         |
| posterize       | keeps 0.4 M bits; 1 for 0, 9 or more | keeps 4 - 0.4 M bits              |
| solarize        | from (25.6 M modulo 256) on          | from 256 - 25.6 M on              |
| solarize_add    | 11 M                                 | 11 M                              |
| shear, rotate   | 0.03 M, 3 M degrees, either way      | the same                          |
| translate       | 10 M pixels, either way              | 4.5 M % of the side, either way   |
| cutout          | a square of side 8 M                 | (elsewhere: `random_erasing`)     |
| contrast's grey | the number of pixels / 256           | the image's mean brightness       |
| new pixels      | grey 128                             | `fill`: the data's mean colour    |
| interpolation   | nearest                              | bilinear or bicubic, drawn        |

Enhancements are brightness, color, contrast, sharpness.

The left column is what the code computes, not what its authors intended. TensorFlow stores the
threshold of solarize in eight bits, so that M = 10 and 20 invert the image, as M = 0 does; and it
shifts a byte by at most seven bits. (Checked with TensorFlow 2.15 and NumPy 1.23; NumPy 2 raises an
error for that threshold.) Strength does not grow with M: RandAugment(2, 0) is a strong one.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps
from PIL.Image import Resampling

from vit_jax_zoo.data.transforms import ImageTransform
from vit_jax_zoo.errors import check_names

Pixels: TypeAlias = UInt8[np.ndarray, "h w 3"]

Color: TypeAlias = tuple[int, int, int]  # red, green, blue in [0, 255]


@dataclasses.dataclass(frozen=True)
class RandomErasing(ImageTransform):
  """Erases a random rectangle of `image`, with timm's fields, defaults and distribution.

  timm erases after normalisation, with zeros or normal noise; here, in [0, 255], that is the data's
  mean, or its mean plus noise of its standard deviation, clipped (and rounded for uint8).
  """

  probability: float | int = 0.5  # of erasing
  area: Sequence[float | int] = (0.02, 1 / 3)  # limits of the rectangle's fraction of the image
  aspect_ratio: Sequence[float | int] = (0.3, 1 / 0.3)  # limits of height/width, drawn in logs
  mode: str = "const"  # the mean; "rand": one random color; "pixel": one for each pixel
  image_mean: float | int | Sequence[float | int] = 0.5  # the task's, in [0, 1]; or by channel
  image_std: float | int | Sequence[float | int] = 0.5  # the task's; one number or one a channel

  def __post_init__(self) -> None:
    check_names("random_erasing mode", [self.mode], ("const", "rand", "pixel"))
    self.check("probability", 0 <= self.probability <= 1, "[0, 1]")
    self.check_limits("area", 1.0)
    self.check_limits("aspect_ratio", math.inf)

  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if rng.random() >= self.probability:
      return image
    image = image.copy()
    low, high = (math.log(limit) for limit in self.aspect_ratio)
    for _ in range(10):  # attempts to fit
      area = rng.uniform(self.area[0], self.area[1]) * image.shape[0] * image.shape[1]
      ratio = math.exp(rng.uniform(low, high))
      height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
      if height < image.shape[0] and width < image.shape[1]:
        top = int(rng.integers(image.shape[0] - height, endpoint=True))
        left = int(rng.integers(image.shape[1] - width, endpoint=True))
        part = image[top : top + height, left : left + width]
        part[:] = self._fill(part.shape, image.dtype, rng)
        break
    return image

  def _fill(self, shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    noise = np.zeros(shape[-1])
    if self.mode != "const":
      noise = rng.standard_normal(shape if self.mode == "pixel" else shape[-1])
    values = 255 * (np.asarray(self.image_mean) + np.asarray(self.image_std) * noise)
    values = np.clip(values, 0, 255)
    return (np.rint(values) if dtype == np.uint8 else values).astype(dtype)


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


def contrast(image: Pixels, factor: float, grey: int | None = None) -> Pixels:
  """Blends a gray level, by default the mean brightness, with the image, as `brightness`."""
  if grey is None:
    grey = int(np.mean(np.asarray(Image.fromarray(image).convert("L"))) + 0.5)
  return _look_up(image, _blend_levels(grey, factor))


def color(image: Pixels, factor: float) -> Pixels:
  """Blends the grayscale image with the image, as `brightness`."""
  return np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(factor))


def sharpness(image: Pixels, factor: float) -> Pixels:
  """Blends a smoothed image with the image, as `brightness`."""
  return np.asarray(ImageEnhance.Sharpness(Image.fromarray(image)).enhance(factor))


def affine(
  image: Pixels, matrix: Sequence[float | int], fill: Color, resample: Resampling
) -> Pixels:
  """Reads pixel (x, y) at (a x + b y + c, d x + e y + f), `fill` outside; centers are at halves."""
  original, method = Image.fromarray(image), Image.Transform.AFFINE
  moved = original.transform(original.size, method, tuple(matrix), resample, fillcolor=fill)
  return np.asarray(moved)


def rotate(image: Pixels, degrees: float, fill: Color, resample: Resampling) -> Pixels:
  """Rotates the image counterclockwise about its center."""
  sine, cosine = math.sin(-math.radians(degrees)), math.cos(-math.radians(degrees))
  y, x = image.shape[0] / 2, image.shape[1] / 2
  matrix = (cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y)
  return affine(image, matrix, fill, resample)


def cutout(image: Pixels, center: tuple[int, int], half: int, fill: Color) -> Pixels:
  """Fills the square of side `2 * half` about `center` (row, column), clipped to the image."""
  image = image.copy()
  top, left = (max(0, at - half) for at in center)
  image[top : center[0] + half, left : center[1] + half] = fill
  return image


def _blend_levels(start: int, factor: float) -> np.ndarray:
  """Returns the lookup table of a blend with one level, in float32 as in both libraries."""
  return _truncate(np.float32(start) + np.float32(factor) * (_LEVELS - start).astype(np.float32))


def _truncate(levels: np.ndarray) -> np.ndarray:
  return np.clip(levels, 0, 255).astype(np.uint8)


def _look_up(image: Pixels, table: np.ndarray) -> Pixels:
  return np.asarray(cv2.LUT(image, table.astype(np.uint8).reshape(1, 256, -1)))


GREY = (128, 128, 128)

INTERPOLATIONS = {
  "nearest": (Resampling.NEAREST,),
  "bilinear": (Resampling.BILINEAR,),
  "bicubic": (Resampling.BICUBIC,),
  "random": (Resampling.BILINEAR, Resampling.BICUBIC),
}

COMMON = (
  "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color",
  "contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
"""Operations of both variants."""

_MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_ENHANCEMENTS = ("brightness", "color", "contrast", "sharpness")
_OPERATIONS: dict[str, Callable[..., Pixels]] = {
  function.__name__: function
  for function in (
    auto_contrast, equalize, invert, posterize, solarize, solarize_add, brightness, color, contrast,
    sharpness,
  )
}  # fmt: skip


def _signed(value: float, rng: np.random.Generator) -> float:
  return value if rng.random() < 0.5 else -value


def _move(
  image: Pixels, kind: str, strength: float, reach: float, fill: Color, resample: Resampling
) -> Pixels:
  """Moves pixels by `strength` times 30 degrees, a shear of 0.3, or `reach` pixels."""
  if kind == "rotate":
    return rotate(image, 30 * strength, fill, resample)
  shear, shift = 0.3 * strength, reach * strength
  # TensorFlow (nearest) shears about the center of the first pixel, Pillow about its corner.
  start = -0.5 * shear if resample == Resampling.NEAREST else 0.0
  matrix = {
    "shear_x": (1, shear, start, 0, 1, 0),
    "shear_y": (1, 0, 0, shear, 1, start),
    "translate_x": (1, 0, shift, 0, 1, 0),
    "translate_y": (1, 0, 0, 0, 1, shift),
  }[kind]
  return affine(image, matrix, fill, resample)


@dataclasses.dataclass(frozen=True)
class _Policy(ImageTransform):
  """Draws and applies operations: the base of both variants."""

  operations: ClassVar[tuple[str, ...]] = COMMON

  num_layers: int = 2  # N, number of operations
  magnitude: float | int = 10  # M, in tenths of the ranges above

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

  @abc.abstractmethod
  def apply_layer(self, image: Pixels, operation: str, rng: np.random.Generator) -> Pixels:
    """Returns the image after one operation."""


@dataclasses.dataclass(frozen=True)
class RandAugment(_Policy):
  """RandAugment of EfficientNet's TPU code and big_vision's `randaug(N,M)`, on `image`.

  Its contrast blends with a gray level of the number of pixels / 256 (196 at 224x224) instead of
  the image's mean, as in the published models' training. TensorFlow's values differ from Pillow's
  by at most one level.
  """

  operations = (*COMMON, "cutout")

  def apply_layer(self, image: Pixels, operation: str, rng: np.random.Generator) -> Pixels:
    strength = self.magnitude / 10
    if operation in _MOVES:
      return _move(image, operation, _signed(strength, rng), 100.0, GREY, Resampling.NEAREST)
    if operation == "cutout":
      center = (int(rng.integers(image.shape[0])), int(rng.integers(image.shape[1])))
      return cutout(image, center, int(strength * 40), GREY)
    factor, bits = 0.1 + 1.8 * strength, int(strength * 4)
    arguments = {
      **dict.fromkeys(_ENHANCEMENTS, (factor,)),
      "contrast": (factor, min(255, image.shape[0] * image.shape[1] // 256)),
      "posterize": (bits if 0 < bits <= 8 else 1,),
      "solarize": (int(strength * 256) % 256,),
      "solarize_add": (int(strength * 110),),
    }
    return _OPERATIONS[operation](image, *arguments.get(operation, ()))


@dataclasses.dataclass(frozen=True)
class TimmRandAugment(_Policy):
  """timm's RandAugment on `image`; the defaults are `rand-m9-mstd0.5-inc1`."""

  magnitude: float | int = 9
  magnitude_std: float | int = 0.5  # of each operation's magnitude
  probability: float | int = 0.5  # of applying a drawn operation
  interpolation: str = "random"  # "bilinear" or "bicubic", drawn each time; one of INTERPOLATIONS
  fill: Sequence[int] = GREY  # color of pixels from outside, in [0, 255]; timm's: the data's mean

  def __post_init__(self) -> None:
    super().__post_init__()
    check_names("interpolation", [self.interpolation], INTERPOLATIONS)
    self.check("probability", 0 <= self.probability <= 1, "[0, 1]")
    self.check("magnitude_std", self.magnitude_std >= 0, "at least 0")
    self.check("fill", len(self.fill) == 3, "3 values")

  def apply_layer(self, image: Pixels, operation: str, rng: np.random.Generator) -> Pixels:
    if rng.random() >= self.probability:
      return image
    strength = float(np.clip(rng.normal(self.magnitude, self.magnitude_std), 0, 10)) / 10
    if operation in _MOVES:
      choices = INTERPOLATIONS[self.interpolation]
      resample = choices[rng.integers(len(choices))]
      reach = 0.45 * (image.shape[1] if operation == "translate_x" else image.shape[0])
      red, green, blue = self.fill
      return _move(image, operation, _signed(strength, rng), reach, (red, green, blue), resample)
    if operation in _ENHANCEMENTS:  # the mean brightness is contrast's own default
      return _OPERATIONS[operation](image, max(0.1, 1 + _signed(0.9 * strength, rng)))
    arguments = {
      "posterize": (4 - int(strength * 4),),
      "solarize": (256 - min(256, int(strength * 256)),),
      "solarize_add": (min(128, int(strength * 110)),),
    }
    return _OPERATIONS[operation](image, *arguments.get(operation, ()))
