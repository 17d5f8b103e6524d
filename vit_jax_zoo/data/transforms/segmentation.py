"""Transforms of semantic segmentation: a class for every pixel.

What comes from a source has `label_map`, the bytes of a PNG file with a class id at each pixel, or
the segments of a panoptic example (`data/objects.py`). What goes into a batch has `label_map` uint8
[h w], with `IGNORE` where nothing is to be learned or scored.
"""

import dataclasses
import io
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from vit_jax_zoo.data.sources.base import CorruptExampleError, Example
from vit_jax_zoo.data.transforms.base import Transform, pixels
from vit_jax_zoo.data.transforms.detection import VOID, decode_segments
from vit_jax_zoo.data.transforms.geometry import GeometricTransform, Scale, Size, Step, Window

IGNORE = 255
"""The label of pixels that do not count."""


@dataclasses.dataclass(frozen=True)
class LoadLabelMap(Transform):
  """Decodes `image` and its `label_map`: the first transform of semantic segmentation.

  Reads `image` and either `label_map`, the bytes of a PNG file, or a panoptic example's segments,
  whose boxes, ids and other keys it drops. Writes `image` uint8 [h w 3], `label_map` uint8 [h w]
  with 255 where a pixel does not count, and `original_size` int32 [2].

  Attributes:
    offset: is added to what the file says: -1 for ADE20K, whose classes count from 1.
    ignore: values of the file that do not count: (255,) of Cityscapes' train ids and VOC, (0,) of
      ADE20K. 255 never counts.
    classes: if there are any, the values of the file that are classes, in the order of class ids;
      no other counts. Cityscapes' files have 34 values, of which 19 are learned.
  """

  name = "load_label_map"
  is_target = True

  offset: int = 0
  ignore: Sequence[int] = (IGNORE,)
  classes: Sequence[int] = ()

  def __post_init__(self) -> None:
    if self.classes and (self.offset or tuple(self.ignore) != (IGNORE,)):
      raise ValueError("load_label_map: classes says all; leave out offset and ignore")
    if len(set(self.classes)) < len(self.classes) or min(self.classes, default=0) < 0:
      raise ValueError(
        f"load_label_map: classes are values of the file, each once, not {tuple(self.classes)}"
      )

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example with arrays."""
    del rng
    image = pixels(example["image"])
    values = (
      _segment_labels(example)
      if "segment_image" in example
      else decode_values(example["label_map"])
    )
    if values.shape != image.shape[:2]:
      raise CorruptExampleError(f"its label map is {values.shape}, the image {image.shape[:2]}")
    rest = {key: example[key] for key in ("image_id",) if key in example}
    size = np.array(image.shape[:2], np.int32)
    return {"image": image, "label_map": self._labels(values), "original_size": size, **rest}

  def output_size(self, size: Size, rng: np.random.Generator) -> Size:
    """Returns the same size."""
    del rng
    return size

  def _labels(self, values: Int[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    if self.classes:
      beyond = max(self.classes) + 1
      ids = np.full(beyond + 1, IGNORE, np.uint8)
      ids[list(self.classes)] = np.arange(len(self.classes))
      return ids[np.where((values < 0) | (values > beyond), beyond, values)]
    ignored = np.isin(values, (*self.ignore, IGNORE))
    labels = np.where(ignored, IGNORE, values + self.offset)
    wrong = (labels < 0) | (labels > IGNORE)
    if wrong.any():
      raise ValueError(
        f"label {labels[wrong][0]} (value {values[wrong][0]}, offset {self.offset}) is not in "
        f"0..254; set load_label_map's offset and ignore for this dataset"
      )
    return labels.astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class RandomScale(GeometricTransform):
  """Scales `image`, and what is marked in it, by a factor drawn from a range.

  Attributes:
    smallest: factor.
    largest: factor.
  """

  name = "random_scale"

  smallest: float = 0.5
  largest: float = 2.0

  def __post_init__(self) -> None:
    if not 0 < self.smallest <= self.largest:
      raise ValueError(
        f"random_scale: expected 0 < smallest <= largest, got {self.smallest} and {self.largest}"
      )

  def plan(self, size: Size, rng: np.random.Generator) -> Sequence[Step]:
    """Returns the scale."""
    factor = rng.uniform(self.smallest, self.largest)
    return (Scale(max(1, round(size[0] * factor)), max(1, round(size[1] * factor))),)


@dataclasses.dataclass(frozen=True)
class RandomWindow(GeometricTransform):
  """Cuts a random window out of `image` and what is marked in it; no more than there is.

  Attributes:
    height: of the window; the whole height of images that are not so high.
    width: likewise.
  """

  name = "random_window"

  height: int
  width: int

  def plan(self, size: Size, rng: np.random.Generator) -> Sequence[Step]:
    """Returns the window."""
    height, width = min(self.height, size[0]), min(self.width, size[1])
    top = int(rng.integers(size[0] - height, endpoint=True))
    left = int(rng.integers(size[1] - width, endpoint=True))
    return (Window(top, left, height, width),)


@dataclasses.dataclass(frozen=True)
class PadLabelMap(Transform):
  """Adds `image_size` int32 [2]; pads `image` with 0 and `label_map` with 255. The last transform.

  Attributes:
    height: of the result, or None to leave the padding to `data.loader.buckets`.
    width: likewise.
  """

  name = "pad_label_map"
  is_target = True

  height: int | None = None
  width: int | None = None

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the padded example."""
    del rng
    image, labels = pixels(example["image"]), example["label_map"]
    size = image.shape[:2]
    example = {**example, "image_size": np.array(size, np.int32)}
    below, right = (after - before for after, before in zip(self._size(size), size, strict=True))
    if below < 0 or right < 0:
      raise ValueError(
        f"an image of {size[0]}x{size[1]} does not fit into pad_label_map's {self.height}x"
        f"{self.width}; put random_window or resize_shorter in front of it"
      )
    border = (0, below, 0, right, cv2.BORDER_CONSTANT)
    example["image"] = cv2.copyMakeBorder(image, *border, value=(0, 0, 0))
    example["label_map"] = cv2.copyMakeBorder(labels, *border, value=(IGNORE,))
    return example

  def output_size(self, size: Size, rng: np.random.Generator) -> Size:
    """Returns the padded size."""
    del rng
    return self._size(size)

  def _size(self, size: Size) -> Size:
    return self.height or size[0], self.width or size[1]


def decode_values(data: bytes) -> Int[np.ndarray, "h w"]:
  """Returns the numbers in a PNG file: grey levels, or indices of a palette.

  Raises:
    CorruptExampleError: it is no image, or one of colours.
  """
  try:
    with Image.open(io.BytesIO(data)) as image:
      values = np.array(image)  # Pillow keeps palettes' indices, OpenCV does not
  except (OSError, SyntaxError, ValueError) as error:
    raise CorruptExampleError(f"its label map cannot be decoded ({len(data)} bytes)") from error
  if values.ndim != 2:
    raise CorruptExampleError(
      f"its label map has {values.shape[2]} channels; expected one, with class ids"
    )
  return values.astype(np.int64)


def _segment_labels(example: Example) -> Int[np.ndarray, "h w"]:
  """Returns the class of the segment at each pixel."""
  segments = decode_segments(example["segment_image"], example["object_ids"])
  labels = np.append(example["labels"], IGNORE).astype(np.int64)
  return labels[np.where(segments == VOID, len(labels) - 1, segments)]
