"""Flips, resizes and crops of an image together with its annotations.

The keys that follow the image: `boxes_xyxy` float32 [n 4] in pixels, `masks` bool [n h w], and
`label_map` [h w]. A crop drops objects without area in it. `area` remains as annotated, and
`segment_map` that of the original image, for scoring.

A transform plans its steps from the image's size alone, so that the size of its result is known
before any image is read (`data/buckets.py`).
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import cv2
import numpy as np
from jaxtyping import Bool, Num, UInt8
from PIL import Image

from vit_jax_zoo.data.sources.base import Example
from vit_jax_zoo.data.transforms.base import Transform, pixels

Size: TypeAlias = tuple[int, int]
"""Height and width in pixels."""

PER_OBJECT = ("boxes_xyxy", "labels", "is_crowd", "area", "object_ids", "masks")


class Mirror(NamedTuple):
  """Horizontal flip."""


class Scale(NamedTuple):
  """Resize to a size."""

  height: int
  width: int


class Window(NamedTuple):
  """Crop to a window."""

  top: int
  left: int
  height: int
  width: int


Step: TypeAlias = Mirror | Scale | Window


@dataclasses.dataclass(frozen=True)
class GeometricTransform(Transform):
  """A transform that moves pixels, and the annotations with them."""

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example after the planned steps."""
    example = {**example, "image": pixels(example["image"])}
    for step in self.plan(example["image"].shape[:2], rng):
      example = take(step, example)
    return example

  def output_size(self, size: Size, rng: np.random.Generator) -> Size:
    """Returns the size of the result; draws the same random numbers as a call."""
    for step in self.plan(size, rng):
      size = size if isinstance(step, Mirror) else (step.height, step.width)
    return size

  @abc.abstractmethod
  def plan(self, size: Size, rng: np.random.Generator) -> Sequence[Step]:
    """Returns the steps for an image of this size."""


def take(step: Step, example: Example) -> Example:
  """Returns the example after one step."""
  if isinstance(step, Mirror):
    return mirror(example)
  return resize(example, step) if isinstance(step, Scale) else crop(example, step)


def mirror(example: Example) -> Example:
  """Returns the example, flipped horizontally."""
  example = {**example, "image": cv2.flip(example["image"], 1)}
  if "boxes_xyxy" in example:
    left, top, right, bottom = example["boxes_xyxy"].T
    width = np.float32(example["image"].shape[1])
    example["boxes_xyxy"] = np.stack([width - right, top, width - left, bottom], axis=1)
  for key in ("masks", "label_map"):
    if key in example:
      example[key] = example[key][..., ::-1]
  return example


def resize(example: Example, size: Scale) -> Example:
  """Returns the example, resized with Pillow's bilinear filter.

  Masks take the pixel whose index is rounded down, as torch's "nearest"; label maps the pixel that
  has the new pixel's center.
  """
  before = example["image"].shape[:2]
  if before == tuple(size):
    return example
  example = {**example, "image": scale_image(example["image"], *size)}
  if "boxes_xyxy" in example:
    scale = np.array([size.width / before[1], size.height / before[0]] * 2, np.float32)
    example["boxes_xyxy"] = example["boxes_xyxy"] * scale
  if "masks" in example:
    example["masks"] = _nearest_masks(example["masks"], size)
  if "label_map" in example:
    labels = Image.fromarray(example["label_map"])
    example["label_map"] = np.asarray(labels.resize(size[::-1], Image.Resampling.NEAREST))
  return example


def scale_image(image: Num[np.ndarray, "h w c"], height: int, width: int) -> np.ndarray:
  """Returns uint8 [height width 3], resized with Pillow's antialiased bilinear filter."""
  picture = Image.fromarray(np.ascontiguousarray(image, np.uint8))
  return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def crop(example: Example, window: Window) -> Example:
  """Returns the example, cropped to the window."""
  top, left, height, width = window
  rows, columns = slice(top, top + height), slice(left, left + width)
  example = {**example, "image": example["image"][rows, columns]}
  for key in ("masks", "label_map"):
    if key in example:
      example[key] = example[key][..., rows, columns]
  if "boxes_xyxy" not in example:
    return example
  corner = np.array([left, top] * 2, np.float32)
  example["boxes_xyxy"] = clip(example["boxes_xyxy"] - corner, height, width)
  return keep_objects(example, has_area(example["boxes_xyxy"]))


def clip(boxes_xyxy: Num[np.ndarray, "n 4"], height: int, width: int) -> Num[np.ndarray, "n 4"]:
  """Returns the boxes, clipped to an image of this size."""
  return np.clip(boxes_xyxy, 0, np.array([width, height, width, height], np.float32))


def has_area(boxes_xyxy: Num[np.ndarray, "n 4"]) -> Bool[np.ndarray, " n"]:
  """Returns which boxes have a positive width and height."""
  left, top, right, bottom = boxes_xyxy.T
  return (right > left) & (bottom > top)


def keep_objects(example: Example, keep: Bool[np.ndarray, " n"]) -> Example:
  """Returns the example with the objects where `keep` is True."""
  if keep.all():
    return example
  kept = {key: example[key][keep] for key in PER_OBJECT if key in example}
  if "run_lengths" in example:
    kept["run_lengths"] = _keep_lines(example["run_lengths"], keep)
  return example | kept


def _nearest_masks(masks: Bool[np.ndarray, "n h w"], size: Scale) -> Bool[np.ndarray, "n h2 w2"]:
  rows, columns = (
    np.floor(np.arange(after, dtype=np.float32) * np.float32(before / after)).astype(int)
    for before, after in zip(masks.shape[1:], size, strict=True)
  )
  return masks[:, rows.clip(max=masks.shape[1] - 1)][:, :, columns.clip(max=masks.shape[2] - 1)]


def _keep_lines(data: UInt8[np.ndarray, " l"], keep: Bool[np.ndarray, " n"]) -> np.ndarray:
  """Returns the kept lines of a text buffer, padded with zeros to its length."""
  lines = data.tobytes().rstrip(b"\0").splitlines(keepends=True)
  kept = b"".join(line for line, stays in zip(lines, keep, strict=True) if stays)
  return np.frombuffer(kept.ljust(len(data), b"\0"), np.uint8)
