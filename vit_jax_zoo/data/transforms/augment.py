"""RandAugment, in the two flavours that published models were trained with.

  Cubuk, Zoph, Shlens, Le, "RandAugment: Practical automated data augmentation with a reduced search
  space", arXiv:1909.13719

A layer draws one operation and applies it at a common magnitude M, in tenths of a range; N layers
follow each other, each drawn from the whole list again. So far the paper; the rest differs:

|                 | `rand_augment`                       | `timm_rand_augment`               |
|-----------------|--------------------------------------|-----------------------------------|
| comes from      | EfficientNet's TPU code; big_vision  | timm: `rand-m9-mstd0.5-inc1`      |
| operations      | 16                                   | 15: no cutout                     |
| a layer acts    | always                               | with probability 0.5              |
| magnitude       | M, also above 10 (AugReg has 20)     | normal about M, cut to [0, 10]    |
| enhancements    | 0.1 + 0.18 M                         | 1 +- 0.09 M, at least 0.1 (*)     |
| posterize       | keeps 0.4 M bits; 1 for 0, 9 or more | keeps 4 - 0.4 M bits (*)          |
| solarize        | from (25.6 M modulo 256) on          | from 256 - 25.6 M on (*)          |
| solarize_add    | 11 M                                 | 11 M                              |
| shear, rotate   | 0.03 M, 3 M degrees, either way      | the same                          |
| translate       | 10 M pixels, either way              | 4.5 M % of the side, either way   |
| cutout          | a square of side 8 M                 | (elsewhere: `random_erasing`)     |
| contrast's grey | the number of pixels / 256           | the image's mean brightness       |
| new pixels      | grey 128                             | `fill`: the data's mean colour    |
| interpolation   | nearest                              | bilinear or bicubic, drawn        |

Enhancements are brightness, color, contrast, sharpness. (*) With `increasing`; without it as on the
left, but thresholds do not overflow, and posterize may keep no bit.

The left column is what was run, not what was meant. TensorFlow keeps the threshold of solarize in
eight bits, so at M = 10 and 20, where it should do nothing, it inverts the image, as it does at
M = 0; and it shifts a byte by seven bits at most. (Tried with TensorFlow 2.15 and NumPy 1.23; with
NumPy 2 that threshold is an error.) Strength does not grow with M: RandAugment(2, 0) is one of the
strong ones.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter

from vit_jax_zoo.data.transforms.base import ImageTransform
from vit_jax_zoo.errors import unknown_name

MODES = ("const", "rand", "pixel")

_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class RandomErasing(ImageTransform):
  """Erases random rectangles of `image`, with timm's fields, defaults and way of drawing.

  timm erases after normalisation, with zeros or normal noise; here pixels are still in [0, 255], so
  that is the data's mean, or its mean and so many of its standard deviations, clipped (and rounded,
  in a uint8 image).

  Attributes:
    probability: that an image loses anything.
    area: smallest and largest share of the image that all rectangles together take.
    aspect_ratio: smallest and largest height/width, drawn on a logarithmic scale.
    mode: "const": the mean; "rand": one random colour a rectangle; "pixel": one a pixel.
    max_count: an image loses 1 to so many rectangles.
    image_mean: as the task has it, in [0, 1]; one for all channels or one for each.
    image_std: as `image_mean`.
  """

  name = "random_erasing"

  probability: float | int = 0.5
  area: Sequence[float | int] = (0.02, 1 / 3)
  aspect_ratio: Sequence[float | int] = (0.3, 1 / 0.3)
  mode: str = "const"
  max_count: int = 1
  image_mean: float | int | Sequence[float | int] = 0.5
  image_std: float | int | Sequence[float | int] = 0.5

  def __post_init__(self) -> None:
    if self.mode not in MODES:
      raise ValueError(unknown_name("random_erasing mode", self.mode, MODES))
    if not 0 <= self.probability <= 1 or self.max_count < 1:
      raise ValueError(
        "random_erasing needs a probability in [0, 1] and a max_count of at least 1, not "
        f"{self.probability} and {self.max_count}"
      )
    for field, value, upper in (
      ("area", self.area, 1.0), ("aspect_ratio", self.aspect_ratio, math.inf),
    ):  # fmt: skip
      if not (len(value) == 2 and 0 < value[0] <= value[1] <= upper):
        raise ValueError(f"random_erasing: {field} must be (smallest, largest), got {value}")

  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the image, erased or as it was; type and range stay."""
    if rng.random() >= self.probability:
      return image
    image = image.copy()
    count = int(rng.integers(1, self.max_count, endpoint=True))
    for _ in range(count):
      box = self._box(image.shape[:2], count, rng)
      if box is not None:
        top, left, height, width = box
        part = image[top : top + height, left : left + width]
        part[:] = self._fill(part.shape, image.dtype, rng)
    return image

  def _box(
    self, size: tuple[int, int], count: int, rng: np.random.Generator
  ) -> tuple[int, int, int, int] | None:
    """Draws (top, left, height, width); None when ten attempts found no box that fits."""
    for _ in range(_ATTEMPTS):
      area = rng.uniform(self.area[0], self.area[1]) * size[0] * size[1] / count
      ratio = math.exp(rng.uniform(math.log(self.aspect_ratio[0]), math.log(self.aspect_ratio[1])))
      height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
      if height < size[0] and width < size[1]:
        top = int(rng.integers(size[0] - height, endpoint=True))
        return top, int(rng.integers(size[1] - width, endpoint=True)), height, width
    return None

  def _fill(self, shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Returns values for a rectangle, or one colour for all of it."""
    noise = np.zeros(shape[-1])
    if self.mode != "const":
      noise = rng.standard_normal(shape if self.mode == "pixel" else shape[-1])
    values = np.clip(
      255 * (np.asarray(self.image_mean) + np.asarray(self.image_std) * noise), 0, 255
    )
    return (np.rint(values) if dtype == np.uint8 else values).astype(dtype)


Pixels_augment_ops: TypeAlias = UInt8[np.ndarray, "h w 3"]

Color: TypeAlias = tuple[int, int, int]
"""Red, green, blue in [0, 255]."""

NEAREST, BILINEAR, BICUBIC = (
  Image.Resampling.NEAREST,
  Image.Resampling.BILINEAR,
  Image.Resampling.BICUBIC,
)

_LEVELS = np.arange(256)
_SMOOTH = ImageFilter.Kernel((3, 3), (1, 1, 1, 1, 5, 1, 1, 1, 1), scale=13)


def auto_contrast(image: Pixels_augment_ops) -> Pixels_augment_ops:
  """Stretches each channel to [0, 255]; one of a single value stays."""
  tables = []
  for channel in cv2.split(image):
    low, high, _, _ = cv2.minMaxLoc(channel)
    scale = 255.0 / (high - low) if high > low else 1.0
    offset = -low * scale if high > low else 0.0
    tables.append(_truncate(_LEVELS * scale + offset))
  return _look_up(image, np.stack(tables, axis=1))


def equalize(image: Pixels_augment_ops) -> Pixels_augment_ops:
  """Spreads the values of each channel so that their histogram is as flat as can be."""
  histograms = np.reshape(Image.fromarray(image).histogram(), (3, 256))
  return _look_up(image, np.stack([_equalizing(h) for h in histograms], axis=1))


def _equalizing(histogram: np.ndarray) -> np.ndarray:
  step = (histogram.sum() - histogram[histogram > 0][-1]) // 255
  if step == 0:
    return _LEVELS.astype(np.uint8)
  below = np.cumsum(histogram) - histogram
  return _truncate((below + step // 2) // step)


def invert(image: Pixels_augment_ops) -> Pixels_augment_ops:
  """Returns the negative."""
  return cv2.bitwise_not(image)


def posterize(image: Pixels_augment_ops, bits: int) -> Pixels_augment_ops:
  """Keeps the `bits` highest bits of each value, 0 to 8 of them."""
  return image & np.uint8(256 - (1 << (8 - bits)))


def solarize(image: Pixels_augment_ops, threshold: int) -> Pixels_augment_ops:
  """Inverts the values from `threshold` on; 256 leaves all as they are."""
  return _look_up(image, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS))


def solarize_add(image: Pixels_augment_ops, addition: int) -> Pixels_augment_ops:
  """Adds to the values below 128, up to 255."""
  return _look_up(image, np.where(_LEVELS < 128, np.minimum(_LEVELS + addition, 255), _LEVELS))


def brightness(image: Pixels_augment_ops, factor: float) -> Pixels_augment_ops:
  """Blends from black (0) to the image (1) and beyond."""
  return _look_up(image, _blend_levels(0, factor))


def contrast(
  image: Pixels_augment_ops, factor: float, grey: int | None = None
) -> Pixels_augment_ops:
  """Blends from a grey image (0) to the image (1) and beyond.

  Args:
    image: pixels.
    factor: how far.
    grey: the level to blend from; None: the mean brightness of the image, rounded.
  """
  if grey is None:
    grey = int(np.mean(np.asarray(Image.fromarray(image).convert("L"))) + 0.5)
  return _look_up(image, _blend_levels(grey, factor))


def color(image: Pixels_augment_ops, factor: float) -> Pixels_augment_ops:
  """Blends from black and white (0) to the image (1) and beyond."""
  original = Image.fromarray(image)
  return np.asarray(Image.blend(original.convert("L").convert("RGB"), original, factor))


def sharpness(image: Pixels_augment_ops, factor: float) -> Pixels_augment_ops:
  """Blends from a slightly smoothed image (0) to the image (1) and beyond; the edge stays."""
  original = Image.fromarray(image)
  return np.asarray(Image.blend(original.filter(_SMOOTH), original, factor))


def affine(
  image: Pixels_augment_ops,
  matrix: Sequence[float | int],
  fill: Color,
  resample: Image.Resampling = NEAREST,
) -> Pixels_augment_ops:
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
  image: Pixels_augment_ops, degrees: float, fill: Color, resample: Image.Resampling = NEAREST
) -> Pixels_augment_ops:
  """Turns the image counterclockwise about its middle."""
  sine, cosine = math.sin(-math.radians(degrees)), math.cos(-math.radians(degrees))
  y, x = image.shape[0] / 2, image.shape[1] / 2
  matrix = (cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y)
  return affine(image, matrix, fill, resample)


def cutout(
  image: Pixels_augment_ops, center: tuple[int, int], half: int, fill: Color
) -> Pixels_augment_ops:
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


def _look_up(image: Pixels_augment_ops, table: np.ndarray) -> Pixels_augment_ops:
  """Maps values through a table, [256] or [256 3] with one for each channel."""
  return np.asarray(cv2.LUT(image, table.astype(np.uint8).reshape(1, 256, -1)))


Pixels: TypeAlias = np.ndarray

GREY = (128, 128, 128)

INTERPOLATIONS = {
  "nearest": (NEAREST,),
  "bilinear": (BILINEAR,),
  "bicubic": (BICUBIC,),
  "random": (BILINEAR, BICUBIC),
}

COMMON = (
  "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color",
  "contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
"""The operations of both flavours."""


@dataclasses.dataclass(frozen=True)
class _Policy(ImageTransform):
  """What both flavours do: draw operations, and look up how each is applied.

  Attributes:
    num_layers: the paper's N.
    magnitude: the paper's M.
  """

  operations: ClassVar[tuple[str, ...]] = COMMON

  num_layers: int = 2
  magnitude: float | int = 10

  def __post_init__(self) -> None:
    if self.num_layers < 1 or not 0 <= self.magnitude <= 30:
      raise ValueError(
        f"{self.name} needs num_layers of at least 1 and a magnitude in [0, 30], not "
        f"{self.num_layers} and {self.magnitude}"
      )

  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the augmented image, uint8.

    Raises:
      ValueError: the image is not uint8.
    """
    if image.dtype != np.uint8:
      raise ValueError(
        f"{self.name} needs uint8 images, but this one is {image.dtype}; put it before transforms "
        "with dtype='float32'"
      )
    for _ in range(self.num_layers):
      image = self.apply_layer(image, self.operations[rng.integers(len(self.operations))], rng)
    return image

  @abc.abstractmethod
  def apply_layer(self, image: Pixels, operation: str, rng: np.random.Generator) -> Pixels:
    """Returns the image after one operation."""


@dataclasses.dataclass(frozen=True)
class RandAugment(_Policy):
  """RandAugment as EfficientNet's TPU code has it, and big_vision's `randaug(N,M)`.

  Its enhanced contrast blends from a grey level that is the number of pixels / 256 (196 at 224x224)
  where the image's mean was meant; models were trained with it, so it stays. TensorFlow computes a
  few values otherwise than Pillow, by one grey level at most.

  Attributes:
    num_layers: N, how many operations an image goes through.
    magnitude: M, in tenths of the ranges above.
  """

  name = "rand_augment"
  operations = (*COMMON, "cutout")

  def apply_layer(self, image: Pixels, operation: str, rng: np.random.Generator) -> Pixels:
    """Returns the image after one operation."""
    share = self.magnitude / 10
    if operation in _MOVES:
      move = _MOVES[operation]
      return move(image, _signed(share, rng), 100.0, GREY, NEAREST)
    if operation == "cutout":
      center = (int(rng.integers(image.shape[0])), int(rng.integers(image.shape[1])))
      return cutout(image, center, int(share * 40), GREY)
    if operation == "contrast":
      grey = min(255, image.shape[0] * image.shape[1] // 256)
      return contrast(image, 0.1 + 1.8 * share, grey)
    if operation in _ENHANCEMENTS:
      return _ENHANCEMENTS[operation](image, 0.1 + 1.8 * share)
    if operation == "posterize":
      bits = int(share * 4)
      return posterize(image, bits if 0 < bits <= 8 else 1)
    if operation == "solarize":
      return solarize(image, int(share * 256) % 256)
    if operation == "solarize_add":
      return solarize_add(image, int(share * 110))
    return _PLAIN[operation](image)


@dataclasses.dataclass(frozen=True)
class TimmRandAugment(_Policy):
  """RandAugment as timm has it; the defaults are its `rand-m9-mstd0.5-inc1`.

  Attributes:
    num_layers: N, how many operations are drawn.
    magnitude: M, in tenths of the ranges above.
    magnitude_std: standard deviation of each operation's magnitude; 0: always M.
    probability: that a drawn operation is applied.
    increasing: all operations grow stronger with M.
    interpolation: "random" draws "bilinear" or "bicubic" each time; or one of these, or "nearest".
    fill: colour of what comes into view, in [0, 255]; timm takes the mean of the data.
  """

  name = "timm_rand_augment"

  magnitude: float | int = 9
  magnitude_std: float | int = 0.5
  probability: float | int = 0.5
  increasing: bool = True
  interpolation: str = "random"
  fill: Sequence[int] = GREY

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.interpolation not in INTERPOLATIONS:
      raise ValueError(unknown_name("interpolation", self.interpolation, INTERPOLATIONS))
    if not 0 <= self.probability <= 1 or self.magnitude_std < 0 or len(self.fill) != 3:
      raise ValueError(
        f"{self.name} needs a probability in [0, 1], a magnitude_std of at least 0 and a fill of 3 "
        f"values, not {self.probability}, {self.magnitude_std} and {self.fill}"
      )

  def apply_layer(self, image: Pixels, operation: str, rng: np.random.Generator) -> Pixels:
    """Returns the image after one operation, or as it was."""
    if rng.random() >= self.probability:
      return image
    magnitude = rng.normal(self.magnitude, self.magnitude_std)
    share = float(np.clip(magnitude, 0, 10)) / 10
    if operation in _MOVES:
      return self._move(image, operation, share, rng)
    if operation in _ENHANCEMENTS:
      # The mean brightness is contrast's own default.
      factor = max(0.1, 1 + _signed(0.9 * share, rng)) if self.increasing else 0.1 + 1.8 * share
      return _ENHANCEMENTS[operation](image, factor)
    if operation == "posterize":
      bits = int(share * 4)
      return posterize(image, 4 - bits if self.increasing else bits)
    if operation == "solarize":
      threshold = min(256, int(share * 256))
      return solarize(image, 256 - threshold if self.increasing else threshold)
    if operation == "solarize_add":
      return solarize_add(image, min(128, int(share * 110)))
    return _PLAIN[operation](image)

  def _move(self, image: Pixels, operation: str, share: float, rng: np.random.Generator) -> Pixels:
    choices = INTERPOLATIONS[self.interpolation]
    resample = choices[rng.integers(len(choices))]
    side = image.shape[1] if operation == "translate_x" else image.shape[0]
    fill = (self.fill[0], self.fill[1], self.fill[2])
    return _MOVES[operation](image, _signed(share, rng), 0.45 * side, fill, resample)


def _signed(value: float, rng: np.random.Generator) -> float:
  return value if rng.random() < 0.5 else -value


def _move(
  kind: str,
  image: Pixels,
  share: float,
  way: float,
  fill: Color,
  resample: Image.Resampling,
) -> Pixels:
  """Moves pixels by a share of the longest way: 30 degrees, a shear of 0.3, or `way` pixels."""
  if kind == "rotate":
    return rotate(image, 30 * share, fill, resample)
  shear, shift = 0.3 * share, way * share
  # TensorFlow, which takes the nearest, shears about the centre of the first pixel; Pillow about
  # its corner.
  start = -0.5 * shear if resample == NEAREST else 0.0
  matrix = {
    "shear_x": (1, shear, start, 0, 1, 0),
    "shear_y": (1, 0, 0, shear, 1, start),
    "translate_x": (1, 0, shift, 0, 1, 0),
    "translate_y": (1, 0, 0, 0, 1, shift),
  }[kind]
  return affine(image, matrix, fill, resample)


_MOVES: dict[str, Callable[..., Pixels]] = {
  kind: functools.partial(_move, kind)
  for kind in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
}
_ENHANCEMENTS: dict[str, Callable[[Pixels, float], Pixels]] = {
  "brightness": brightness,
  "color": color,
  "contrast": contrast,
  "sharpness": sharpness,
}
_PLAIN: dict[str, Callable[[Pixels], Pixels]] = {
  "auto_contrast": auto_contrast,
  "equalize": equalize,
  "invert": invert,
}
