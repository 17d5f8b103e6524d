"""Crops, resizes and targets of single images."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import cv2
import numpy as np

from vit_jax_zoo.data import images
from vit_jax_zoo.data import resize as tf_resize
from vit_jax_zoo.data.sources.base import Example
from vit_jax_zoo.data.transforms.base import ImageTransform, Transform, pixels
from vit_jax_zoo.errors import unknown_name

Size: TypeAlias = int | tuple[int, int] | list[int]
"""A side in pixels, or (height, width)."""

Range: TypeAlias = Sequence[float | int]
"""The smallest and the largest value."""

PIXEL_TYPES = ("uint8", "float32")


class Decode(ImageTransform):
  """Decodes `image`: bytes -> uint8 [h w 3] in [0, 255], RGB; see `images.decode_image`."""

  name = "decode"

  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the pixels."""
    del rng
    return image


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(Transform):
  """Inception crop: `image` -> uint8 [size size 3], a random box resized to a square.

  The box has the distribution of `tf.image.sample_distorted_bounding_box` (Szegedy et al., 2015,
  arXiv:1409.4842, section 6): a uniform aspect ratio, then a uniform height between those of the
  smallest and the largest area; after 100 failed attempts, the whole image.

  Attributes:
    size: side of the result, or (height, width).
    area: smallest and largest area as a fraction of the image.
    aspect_ratio: smallest and largest width/height.
    antialias: filter where the box shrinks. TensorFlow's pipelines do not.
  """

  name = "random_resized_crop"

  size: Size
  area: Range = (0.05, 1.0)
  aspect_ratio: Range = (3 / 4, 4 / 3)
  antialias: bool = True

  def __post_init__(self) -> None:
    _check_range("area", self.area, 1.0)
    _check_range("aspect_ratio", self.aspect_ratio, math.inf)

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example with the crop as `image`."""
    image, new = example["image"], _height_width(self.size)
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
  size: tuple[int, int],
  area: Range,
  aspect_ratio: Range,
  rng: np.random.Generator,
) -> tuple[int, int, int, int]:
  """Draws (top, left, height, width) in an image of `size`; see RandomResizedCrop."""
  total = size[0] * size[1]
  for _ in range(100):
    ratio = rng.uniform(aspect_ratio[0], aspect_ratio[1])
    low, high = (round(math.sqrt(share * total / ratio)) for share in area)
    # The tallest box of this ratio that is no wider and no taller than the image.
    high = min(high, size[0], math.floor((size[1] + 0.5 - 1e-7) / ratio))
    height = int(rng.integers(min(low, high), high, endpoint=True))
    width = round(height * ratio)
    if height < 1 or not 1 <= width <= size[1]:
      continue
    # Rounding to pixels may leave the interval: draw again.
    if area[0] * total <= height * width <= area[1] * total:
      top = int(rng.integers(size[0] - height, endpoint=True))
      left = int(rng.integers(size[1] - width, endpoint=True))
      return top, left, height, width
  return 0, 0, *size


def _decode_for(
  data: bytes, size: tuple[int, int], box: tuple[int, int, int, int], new: tuple[int, int]
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
  """Decodes at the smallest scale at which `box` has at least the pixels of `new`."""
  reduce = next(r for r in (8, 4, 2, 1) if r == 1 or min(box[2] / new[0], box[3] / new[1]) >= r)
  if reduce == 1:
    return images.decode_image(data, rows=box[0] + box[2]), box
  image = images.decode_image(data, reduce)
  if image.shape[:2] == size:
    return image, box
  top, left, bottom, right = (
    round(edge / reduce) for edge in (box[0], box[1], box[0] + box[2], box[1] + box[3])
  )
  return image, (top, left, bottom - top, right - left)


@dataclasses.dataclass(frozen=True)
class RandomResizeSmall(ImageTransform):
  """Resizes `image`, with antialiasing, so that its shorter side is drawn from a range.

  With a random crop behind it, the augmentation of AlexNet, VGG and iGPT (section 3.1).

  Attributes:
    smallest: of the shorter sides, in pixels.
    largest: of the shorter sides.
  """

  name = "random_resize_small"

  smallest: int
  largest: int

  def __post_init__(self) -> None:
    if not 0 < self.smallest <= self.largest:
      raise ValueError(
        "random_resize_small: smallest must lie between 1 and largest, got "
        f"{self.smallest} and {self.largest}"
      )

  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the resized image; the longer side is rounded."""
    scale = rng.integers(self.smallest, self.largest, endpoint=True) / min(image.shape[:2])
    height, width = (round(side * scale) for side in image.shape[:2])
    return images.resize(image, height, width, "antialias")


@dataclasses.dataclass(frozen=True)
class RandomTranslate(ImageTransform):
  """Shifts `image` at random: CIFAR's padding and random crop.

  Attributes:
    pixels: largest shift in each direction.
    fill: value of the padding; None reflects the image without repeating its edge.
  """

  name = "random_translate"

  pixels: int
  fill: int | None = 0

  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the shifted image."""
    height, width = image.shape[:2]
    margin = self.pixels
    border = cv2.BORDER_REFLECT_101 if self.fill is None else cv2.BORDER_CONSTANT
    padded = cv2.copyMakeBorder(
      image, margin, margin, margin, margin, border, value=(self.fill or 0,) * 3
    )
    top, left = rng.integers(2 * margin, size=2, endpoint=True)
    return padded[top : top + height, left : left + width]


@dataclasses.dataclass(frozen=True)
class RandomCrop(ImageTransform):
  """Crops `image` to a random window of `size`."""

  name = "random_crop"

  size: Size

  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the window."""
    height, width = _window(image, self.size)
    top = rng.integers(image.shape[0] - height, endpoint=True)
    left = rng.integers(image.shape[1] - width, endpoint=True)
    return image[top : top + height, left : left + width]


@dataclasses.dataclass(frozen=True)
class CentralCrop(ImageTransform):
  """Crops `image` to its central window of `size`."""

  name = "central_crop"

  size: Size

  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the window; an odd remainder leaves the smaller half above and to the left."""
    del rng
    height, width = _window(image, self.size)
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


@dataclasses.dataclass(frozen=True)
class Resize(ImageTransform):
  """Resizes `image` to `size`, ignoring the aspect ratio, with TensorFlow's exact results.

  Attributes:
    size: side of the result, or (height, width).
    method: "bilinear" (TensorFlow's default; does not antialias), "area" or "antialias".
    dtype: "uint8" drops the fraction, as big_vision does after each resize; "float32" keeps it:
      with `dtype="float32"` this is the test pipeline of google-research/vision_transformer.
  """

  name = "resize"

  size: Size
  method: str = "bilinear"
  dtype: str = "uint8"

  def __post_init__(self) -> None:
    _check_choice("resize method", self.method, tf_resize.METHODS)
    _check_choice("pixel type", self.dtype, PIXEL_TYPES)

  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the resized image."""
    del rng
    return _resized(image, _height_width(self.size), self.method, self.dtype)


@dataclasses.dataclass(frozen=True)
class ResizeSmall(ImageTransform):
  """Resizes `image` so that its shorter side is `size`, keeping the aspect ratio.

  Attributes:
    size: the shorter side of the result; the longer one is rounded.
    method: "area" (big_vision's), "bilinear" or "antialias".
    dtype: "uint8" drops the fraction, as big_vision does; "float32" keeps it.
  """

  name = "resize_small"

  size: int
  method: str = "area"
  dtype: str = "uint8"

  def __post_init__(self) -> None:
    _check_choice("resize method", self.method, tf_resize.METHODS)
    _check_choice("pixel type", self.dtype, PIXEL_TYPES)

  def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the resized image."""
    del rng
    # In float32, as TensorFlow: it decides where a side comes to a half.
    scale = np.float32(self.size) / np.float32(min(image.shape[:2]))
    height, width = (round(float(np.float32(side) * scale)) for side in image.shape[:2])
    return _resized(image, (height, width), self.method, self.dtype)


@dataclasses.dataclass(frozen=True)
class OneHot(Transform):
  """`label`: int -> float32 [num_classes], `on_value` at the label and `off_value` elsewhere."""

  name = "one_hot"
  is_target = True

  num_classes: int
  on_value: float = 1.0
  off_value: float = 0.0

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example with the vector in the place of `label`."""
    del rng
    target = np.full(self.num_classes, self.off_value, np.float32)
    target[_labels(example["label"], self.num_classes)] = self.on_value
    return {**example, "label": target}


class MultiHot(OneHot):
  """`label`: any number of ints -> float32 [num_classes], 1 at each of them.

  For datasets of several labels an image (JFT, ImageNet-ReaL) and the sigmoid cross-entropy.
  """

  name = "multi_hot"


@dataclasses.dataclass(frozen=True)
class KeepPrefix(Transform):
  """Adds `prefix_length`, int32: number of pixels in raster order that a completion begins with.

  `image` is decoded and stays whole, for comparison.

  Attributes:
    share: fraction of the image's rows in the prefix, rounded to whole rows.
  """

  name = "keep_prefix"

  share: float = 0.5

  def __post_init__(self) -> None:
    if not 0 <= self.share <= 1:
      raise ValueError(f"keep_prefix: share must lie in [0, 1], got {self.share}")

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example with `prefix_length`."""
    del rng
    image = pixels(example["image"])
    height, width = image.shape[:2]
    return {**example, "image": image, "prefix_length": round(self.share * height) * width}


def _labels(label: Any, num_classes: int) -> np.ndarray:
  """Returns the labels as int [n], checked against num_classes."""
  labels = np.asarray(label, np.int64).reshape(-1)
  for value in labels:
    if not 0 <= value < num_classes:
      raise ValueError(f"label {value} is outside 0..{num_classes - 1} (num_classes={num_classes})")
  return labels


def _resized(image: np.ndarray, new: tuple[int, int], method: str, dtype: str) -> np.ndarray:
  resized = tf_resize.tf_resize(image, *new, method)
  return tf_resize.truncate(resized) if dtype == "uint8" else resized


def _height_width(size: Size) -> tuple[int, int]:
  height, width = (size, size) if isinstance(size, int) else size
  return height, width


def _window(image: np.ndarray, size: Size) -> tuple[int, int]:
  height, width = _height_width(size)
  if height > image.shape[0] or width > image.shape[1]:
    raise ValueError(
      f"crop of {height}x{width} exceeds the image of {image.shape[0]}x{image.shape[1]}; resize it "
      "first"
    )
  return height, width


def _check_range(field: str, value: Range, upper: float) -> None:
  if not (len(value) == 2 and 0 < value[0] <= value[1] <= upper):
    raise ValueError(f"random_resized_crop: {field} must be (smallest, largest), got {value}")


def _check_choice(kind: str, given: str, known: Iterable[str]) -> None:
  if given not in known:
    raise ValueError(unknown_name(kind, given, known))
