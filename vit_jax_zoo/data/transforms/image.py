"""Crops, resizes and targets of single images."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import cv2
import numpy as np

from vit_jax_zoo.data import images
from vit_jax_zoo.data.sources.base import Example, Source
from vit_jax_zoo.data.transforms import ImageTransform, TargetTransform, Transform, pixels
from vit_jax_zoo.errors import check_names

Size: TypeAlias = int | tuple[int, int] | list[int]  # a side in pixels, or (height, width)
Range: TypeAlias = Sequence[float | int]  # the smallest and the largest value
Box: TypeAlias = tuple[int, int, int, int]  # top, left, height and width in pixels


class Decode(ImageTransform):
  """Decodes `image`: bytes -> uint8 [h w 3] in [0, 255], RGB; see `images.decode_image`."""

  def apply(self, image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return image


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(Transform):
  """Inception crop: `image` -> uint8 [size size 3], a random box resized to a square.

  The box has the distribution of `tf.image.sample_distorted_bounding_box` (Szegedy et al., 2015,
  arXiv:1409.4842, section 6): a uniform aspect ratio, then a uniform height between those of the
  smallest and the largest area; after 100 failed attempts, the whole image.
  """

  size: Size
  area: Range = (0.05, 1.0)  # smallest and largest, as a fraction of the image
  aspect_ratio: Range = (3 / 4, 4 / 3)  # smallest and largest width/height
  antialias: bool = True  # filter where the box shrinks; TensorFlow's pipelines do not

  def __post_init__(self) -> None:
    self.check_limits("area", 1.0)
    self.check_limits("aspect_ratio", math.inf)

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    image, new = example["image"], height_width(self.size)
    if isinstance(image, bytes):
      size = images.image_size(image)
      box = sample_distorted_box(size, self.area, self.aspect_ratio, rng)
      image, box = _decode_for(image, size, box, new if self.antialias else box[2:])
    else:
      image = pixels(image)
      box = sample_distorted_box(image.shape[:2], self.area, self.aspect_ratio, rng)
    top, left, height, width = box
    crop = image[top : top + height, left : left + width]
    method = "antialias" if self.antialias else "bilinear"
    return {**example, "image": images.resize(crop, *new, method)}


def sample_distorted_box(
  size: tuple[int, int], area: Range, aspect_ratio: Range, rng: np.random.Generator
) -> Box:
  """Draws a box in an image of `size`; see RandomResizedCrop."""
  total = size[0] * size[1]
  for _ in range(100):
    ratio = rng.uniform(aspect_ratio[0], aspect_ratio[1])
    low, high = (round(math.sqrt(fraction * total / ratio)) for fraction in area)
    # The tallest box of this ratio that is no wider and no taller than the image.
    high = min(high, size[0], math.floor((size[1] + 0.5 - 1e-7) / ratio))
    height = int(rng.integers(min(low, high), high, endpoint=True))
    width = round(height * ratio)
    if height < 1 or not 1 <= width <= size[1]:
      continue
    # Rounding to pixels may leave the interval: draw again.
    if area[0] * total <= height * width <= area[1] * total:
      top = int(rng.integers(size[0] - height, endpoint=True))
      return top, int(rng.integers(size[1] - width, endpoint=True)), height, width
  return 0, 0, *size


def _decode_for(
  data: bytes, size: tuple[int, int], box: Box, new: tuple[int, int]
) -> tuple[np.ndarray, Box]:
  """Decodes at the smallest scale at which `box` has at least the pixels of `new`."""
  top, left, height, width = box
  reduce = next(r for r in (8, 4, 2, 1) if r == 1 or min(height / new[0], width / new[1]) >= r)
  if reduce == 1:
    return images.decode_image(data, rows=top + height), box
  image = images.decode_image(data, reduce)
  if image.shape[:2] == size:
    return image, box
  bottom, right = round((top + height) / reduce), round((left + width) / reduce)
  top, left = round(top / reduce), round(left / reduce)
  return image, (top, left, bottom - top, right - left)


@dataclasses.dataclass(frozen=True)
class RandomResizeSmall(ImageTransform):
  """Resizes `image`, with antialiasing, so that its shorter side is drawn from a range.

  The longer side is rounded. Followed by a random crop, the augmentation of AlexNet, VGG and iGPT
  (section 3.1).
  """

  smallest: int  # of the shorter sides, in pixels
  largest: int

  def __post_init__(self) -> None:
    self.check("smallest", 0 < self.smallest <= self.largest, f"1..{self.largest} (largest)")

  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    scale = rng.integers(self.smallest, self.largest, endpoint=True) / min(image.shape[:2])
    height, width = (round(side * scale) for side in image.shape[:2])
    return images.resize(image, height, width, "antialias")


@dataclasses.dataclass(frozen=True)
class RandomTranslate(ImageTransform):
  """Shifts `image` at random: CIFAR's padding and random crop."""

  pixels: int  # largest shift in each direction
  fill: int | None = 0  # value of the padding; None reflects without repeating the edge

  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    border = cv2.BORDER_REFLECT_101 if self.fill is None else cv2.BORDER_CONSTANT
    value, m = (self.fill or 0,) * 3, self.pixels
    padded = cv2.copyMakeBorder(image, m, m, m, m, border, value=value)
    top, left = rng.integers(2 * m, size=2, endpoint=True)
    return padded[top : top + image.shape[0], left : left + image.shape[1]]


@dataclasses.dataclass(frozen=True)
class RandomCrop(ImageTransform):
  """Crops `image` to a random window of `size`."""

  size: Size

  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _crop(image, self.size, lambda room: int(rng.integers(room, endpoint=True)))


@dataclasses.dataclass(frozen=True)
class CentralCrop(ImageTransform):
  """Crops `image` to its central window of `size`; odd remainders are smaller above and left."""

  size: Size

  def apply(self, image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return _crop(image, self.size, lambda room: room // 2)


def _crop(image: np.ndarray, size: Size, start: Callable[[int], int]) -> np.ndarray:
  height, width = height_width(size)
  if height > image.shape[0] or width > image.shape[1]:
    size_text = f"{image.shape[0]}x{image.shape[1]}"
    raise ValueError(f"crop of {height}x{width} exceeds the image of {size_text}; resize it first")
  top, left = start(image.shape[0] - height), start(image.shape[1] - width)
  return image[top : top + height, left : left + width]


@dataclasses.dataclass(frozen=True)
class Resize(ImageTransform):
  """Resizes `image` to `size`, ignoring the aspect ratio, with TensorFlow's exact results.

  With `dtype="float32"` this is the test pipeline of google-research/vision_transformer.
  """

  size: Size
  method: str = "bilinear"  # TensorFlow's default, does not antialias; "area" or "antialias"
  dtype: str = "uint8"  # drops the fraction, as big_vision's tf.cast; "float32" keeps it

  def __post_init__(self) -> None:
    check_names("resize method", [self.method], images.METHODS)
    check_names("pixel type", [self.dtype], ("uint8", "float32"))

  def apply(self, image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return self._resized(image, *height_width(self.size))

  def _resized(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
    resized = images.tf_resize(image, height, width, self.method)
    return np.clip(resized, 0, 255).astype(np.uint8) if self.dtype == "uint8" else resized


@dataclasses.dataclass(frozen=True)
class ResizeSmall(Resize):
  """Resizes `image` so that its shorter side is `size`, keeping the aspect ratio."""

  size: int  # the shorter side of the result; the longer one is rounded
  method: str = "area"  # big_vision's; "bilinear" or "antialias"

  def apply(self, image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    # In float32, as TensorFlow: the rounding of a side that ends in one half depends on it.
    scale = np.float32(self.size) / np.float32(min(image.shape[:2]))
    height, width = (round(float(np.float32(side) * scale)) for side in image.shape[:2])
    return self._resized(image, *images.bounded_size(height, width))


def height_width(size: Size) -> tuple[int, int]:
  """Returns height and width, given them or the side of a square."""
  height, width = (size, size) if isinstance(size, int) else size
  return height, width


@dataclasses.dataclass(frozen=True)
class OneHot(TargetTransform):
  """`label`: int -> float32 [num_classes], 1 at the label."""

  num_classes: int

  def __call__(self, example: Example, _: np.random.Generator) -> Example:
    labels = np.asarray(example["label"], np.int64).reshape(-1)
    for label in labels:
      if not 0 <= label < self.num_classes:
        raise ValueError(f"label: {label}; expected 0 to {self.num_classes - 1}. Set num_classes")
    target = np.zeros(self.num_classes, np.float32)
    target[labels] = 1.0
    return {**example, "label": target}


@dataclasses.dataclass(frozen=True)
class MultiHot(OneHot):
  """`label`: ints -> float32 [num_classes], 1 at each (JFT, ImageNet-ReaL; sigmoid losses)."""

  num_classes: int = 0  # default: the source's

  def for_source(self, source: Source) -> Transform:
    return dataclasses.replace(self, num_classes=self.num_classes or source.info.num_classes or 0)


@dataclasses.dataclass(frozen=True)
class KeepPrefix(Transform):
  """Adds `prefix_length`, int32: the pixels in raster order that a completion begins with."""

  fraction: float = 0.5  # of the image's rows in the prefix, rounded to whole rows

  def __post_init__(self) -> None:
    self.check("fraction", 0 <= self.fraction <= 1, "[0, 1]")

  def __call__(self, example: Example, _: np.random.Generator) -> Example:
    image = pixels(example["image"])
    height, width = image.shape[:2]
    return {**example, "image": image, "prefix_length": round(self.fraction * height) * width}
