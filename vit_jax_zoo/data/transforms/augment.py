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

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from PIL.Image import Resampling

from vit_jax_zoo.data.transforms import ImageTransform
from vit_jax_zoo.errors import check_names

Picture: TypeAlias = Image.Image
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
_ENHANCEMENTS = {
  "brightness": ImageEnhance.Brightness,
  "color": ImageEnhance.Color,
  "contrast": ImageEnhance.Contrast,
  "sharpness": ImageEnhance.Sharpness,
}


def _solarize_add(image: Picture, addition: int) -> Picture:
  levels = np.arange(256)
  added = np.where(levels < 128, np.minimum(levels + addition, 255), levels)
  return image.point(added.tolist() * 3)


_LEVELS: dict[str, Callable[..., Picture]] = {
  "auto_contrast": ImageOps.autocontrast,
  "equalize": ImageOps.equalize,
  "invert": ImageOps.invert,
  "posterize": ImageOps.posterize,
  "solarize": ImageOps.solarize,
  "solarize_add": _solarize_add,
}


def _signed(value: float, rng: np.random.Generator) -> float:
  return value if rng.random() < 0.5 else -value


def move(
  image: Picture, kind: str, strength: float, reach: float, fill: Color, resample: Resampling
) -> Picture:
  """Moves pixels by `strength` times 30 degrees, a shear of 0.3, or `reach` pixels."""
  angle, shear, shift = -math.radians(30 * strength), 0.3 * strength, reach * strength
  sine, cosine, x, y = math.sin(angle), math.cos(angle), image.width / 2, image.height / 2
  # TensorFlow (nearest) shears about the center of the first pixel, Pillow about its corner.
  start = -0.5 * shear if resample == Resampling.NEAREST else 0.0
  # A pixel (x, y), with centers at halves, is read at (a x + b y + c, d x + e y + f).
  matrix = {
    "rotate": (cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y),
    "shear_x": (1, shear, start, 0, 1, 0),
    "shear_y": (1, 0, 0, shear, 1, start),
    "translate_x": (1, 0, shift, 0, 1, 0),
    "translate_y": (1, 0, 0, 0, 1, shift),
  }[kind]
  return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


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
    layered = Image.fromarray(image)
    for _ in range(self.num_layers):
      layered = self.apply_layer(layered, self.operations[rng.integers(len(self.operations))], rng)
    return np.asarray(layered)

  @abc.abstractmethod
  def apply_layer(self, image: Picture, operation: str, rng: np.random.Generator) -> Picture:
    """Returns the image after one operation."""


@dataclasses.dataclass(frozen=True)
class RandAugment(_Policy):
  """RandAugment of EfficientNet's TPU code and big_vision's `randaug(N,M)`, on `image`.

  Its contrast blends with a gray level of the number of pixels / 256 (196 at 224x224) instead of
  the image's mean, as in the published models' training. TensorFlow's values differ from Pillow's
  by at most one level.
  """

  operations = (*COMMON, "cutout")

  def apply_layer(self, image: Picture, operation: str, rng: np.random.Generator) -> Picture:
    strength = self.magnitude / 10
    factor, bits = 0.1 + 1.8 * strength, int(strength * 4)
    if operation in _MOVES:
      return move(image, operation, _signed(strength, rng), 100.0, GREY, Resampling.NEAREST)
    if operation == "cutout":
      y, x, half = rng.integers(image.height), rng.integers(image.width), int(strength * 40)
      image = image.copy()
      image.paste(GREY, (int(x) - half, int(y) - half, int(x) + half, int(y) + half))
      return image
    if operation == "contrast":
      grey = min(255, image.height * image.width // 256)
      return Image.blend(Image.new("RGB", image.size, (grey, grey, grey)), image, factor)
    if operation in _ENHANCEMENTS:
      return _ENHANCEMENTS[operation](image).enhance(factor)
    arguments = {
      "posterize": (bits if 0 < bits <= 8 else 1,),
      "solarize": (int(strength * 256) % 256,),
      "solarize_add": (int(strength * 110),),
    }
    return _LEVELS[operation](image, *arguments.get(operation, ()))


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
    self.check("magnitude_std", self.magnitude_std >= 0, "at least 0")
    self.check("fill", len(self.fill) == 3, "3 values")

  def apply_layer(self, image: Picture, operation: str, rng: np.random.Generator) -> Picture:
    if rng.random() >= self.probability:
      return image
    strength = float(np.clip(rng.normal(self.magnitude, self.magnitude_std), 0, 10)) / 10
    if operation in _MOVES:
      choices = INTERPOLATIONS[self.interpolation]
      resample = choices[rng.integers(len(choices))]
      reach = 0.45 * (image.width if operation == "translate_x" else image.height)
      red, green, blue = self.fill
      return move(image, operation, _signed(strength, rng), reach, (red, green, blue), resample)
    if operation in _ENHANCEMENTS:
      return _ENHANCEMENTS[operation](image).enhance(max(0.1, 1 + _signed(0.9 * strength, rng)))
    arguments = {
      "posterize": (4 - int(strength * 4),),
      "solarize": (256 - min(256, int(strength * 256)),),
      "solarize_add": (min(128, int(strength * 110)),),
    }
    return _LEVELS[operation](image, *arguments.get(operation, ()))
