"""Transforms of semantic segmentation: a class for every pixel.

Sources give `label_map`, the bytes of a PNG file with a class id at each pixel, or the segments of
a panoptic example (`transforms/detection.py`). Batches have `label_map` uint8 [h w], `IGNORE` where
a pixel is neither trained nor scored.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from absl import logging
from jaxtyping import Int, UInt8

from vit_jax_zoo.data import images
from vit_jax_zoo.data.sources.base import CorruptExampleError, Example, Source
from vit_jax_zoo.data.transforms import TargetTransform, Transform, detection, pixels

IGNORE = 255  # label of pixels that are neither trained nor scored


@dataclasses.dataclass(frozen=True)
class LoadLabelMap(TargetTransform):
  """Decodes `image` and its `label_map`: the first transform of semantic segmentation.

  Reads `image` and `label_map`, a PNG file's bytes, or a panoptic example's segments, whose other
  keys it drops. Writes `image` uint8 [h w 3], `label_map` uint8 [h w] and `original_size` int32
  [2]. A label map of the stored frame's size is rotated with its image (EXIF).
  """

  offset: int = 0  # added to the file's values: -1 for ADE20K, whose classes count from 1
  # Values of the file that are ignored: (255,) of Cityscapes' train ids and VOC, (0,) of ADE20K.
  # 255 is always ignored, unless `classes` names it.
  ignore: Sequence[int] = (IGNORE,)
  # Values of the file in the order of their class ids; all others are ignored. Cityscapes' files
  # have 34 values, of which 19 are classes. (0, 255) for binary masks.
  classes: Sequence[int] = ()

  def __post_init__(self) -> None:
    if self.classes and (self.offset or tuple(self.ignore) != (IGNORE,)):
      raise ValueError("load_label_map: set either classes, or offset and ignore")
    ok = len(set(self.classes)) == len(self.classes) and min(self.classes, default=0) >= 0
    self.check("classes", ok, "different values from 0")

  def for_source(self, source: Source) -> Transform:
    """Checks a sample of label maps.

    ValueError if none can be read, or for masks whose foreground would be ignored.
    """
    counts = _sample_values(source)
    if set(counts) == {0, IGNORE} and not self.classes:
      raise ValueError(
        f"{source.info.name}: the label maps have only the values 0 and 255, and 255 is ignored; "
        "if 255 is the foreground, set load_label_map's classes=(0, 255)"
      )
    if len(counts) == 1:
      text = f"{source.info.name}: only the value {next(iter(counts))} in a sample of label maps"
      _log_once(logging.WARNING, text)
    ignored = {value: n for value, n in counts.most_common() if self._ignored(value)}
    total, valid = counts.total(), sum(n for v, n in counts.items() if v and v not in ignored)
    if ignored:
      suspect = 4 * sum(ignored.values()) > total or ignored.get(IGNORE, 0) > valid
      suspect |= len(counts) - len(ignored) < 2
      values = ", ".join(f"{value} in {n / total:.1%}" for value, n in [*ignored.items()][:10])
      text = f"{source.info.name}: ignored values in a sample of label maps: {values} of the pixels"
      text += "; check load_label_map's ignore, offset and classes"
      _log_once(logging.WARNING if suspect else logging.INFO, text)
    return self

  def __call__(self, example: Example, _: np.random.Generator) -> Example:
    image = pixels(example["image"])
    values, turn = _values(example), example.get("annotation_orientation", 1)
    if turn == 1 and values.shape != image.shape[:2] and isinstance(example["image"], bytes):
      turn = images.parse_header(example["image"])[2]
    values = images.orient(values, turn)
    if values.shape != image.shape[:2]:
      sizes = f"{values.shape[0]}x{values.shape[1]}, its image {image.shape[0]}x{image.shape[1]}"
      raise CorruptExampleError(f"label map is {sizes} (height x width)")
    rest = {key: example[key] for key in ("image_id",) if key in example}
    size = np.array(image.shape[:2], np.int32)
    return {"image": image, "label_map": self._labels(values), "original_size": size, **rest}

  def _ignored(self, values: Any) -> Any:
    if self.classes:
      return ~np.isin(values, self.classes)
    return np.isin(values, (*self.ignore, IGNORE))

  def _labels(self, values: Int[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    if self.classes:
      beyond = max(self.classes) + 1
      ids = np.full(beyond + 1, IGNORE, np.uint8)
      ids[list(self.classes)] = np.arange(len(self.classes))
      return ids[np.where((values < 0) | (values > beyond), beyond, values)]
    labels = np.where(self._ignored(values), IGNORE, values + self.offset)
    wrong = (labels < 0) | (labels > IGNORE)
    if wrong.any():
      label = f"label {labels[wrong][0]} (value {values[wrong][0]}, offset {self.offset})"
      raise ValueError(f"{label} is not in 0..254; set load_label_map's offset and ignore")
    return labels.astype(np.uint8)


_SAMPLE = 8  # label maps that are checked when a run starts, evenly spread over the source

_log_once = functools.cache(logging.log)


@functools.lru_cache(maxsize=32)
def _sample_values(source: Source) -> collections.Counter[int]:
  counts: collections.Counter[int] = collections.Counter()
  failures = []  # a few are reported when they are loaded
  indices = np.unique(np.linspace(0, len(source) - 1, _SAMPLE).astype(int)).tolist()
  for index in indices:
    try:
      example = source[index]
      if "label_map" in example:
        values, numbers = np.unique(_decode(example["label_map"]), return_counts=True)
        counts.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    except (CorruptExampleError, OSError) as error:
      failures.append(f"{source.example_name(index)}: {error}")
  if failures and len(failures) == len(indices):
    raise ValueError(failures[0])
  return counts


def _values(example: Example) -> Int[np.ndarray, "h w"]:
  if "segment_image" not in example:
    return _decode(example["label_map"])
  segments = detection.decode_segments(example["segment_image"], example)
  labels = np.append(example["labels"], IGNORE).astype(np.int64)
  return labels[np.where(segments == detection.VOID, len(labels) - 1, segments)]


def _decode(data: bytes) -> Int[np.ndarray, "h w"]:
  """Returns the values in a PNG file: gray levels, or indices of a palette."""
  try:
    with images.open_image(data) as image:
      codec = f"{image.format} {image.info.get('compression')}".upper()
      values = np.array(image)  # Pillow keeps palettes' indices, OpenCV does not
  except Exception as error:  # decoders raise many types
    raise CorruptExampleError(f"label map cannot be decoded ({len(data)} bytes)") from error
  if values.ndim != 2:
    channels = values.shape[2]
    raise CorruptExampleError(f"label map has {channels} channels; expected one, with class ids")
  is_float = values.dtype.kind == "f"
  if is_float or "JPEG" in codec or "MPO" in codec:
    found = "numbers with a fraction" if is_float else "JPEG, which changes class ids"
    raise CorruptExampleError(f"label map is {found}; expected a PNG file of integers")
  return values.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class RandomScale(detection.GeometricTransform):
  """Scales `image` and its annotations by a factor drawn uniformly."""

  smallest: float = 0.5
  largest: float = 2.0

  def __post_init__(self) -> None:
    ok = 0 < self.smallest <= self.largest
    self.check("smallest", ok, f"above 0, up to largest ({self.largest})")

  def plan(self, size: detection.Size, rng: np.random.Generator) -> Sequence[detection.Step]:
    factor = rng.uniform(self.smallest, self.largest)
    return (detection.Scale(max(1, round(size[0] * factor)), max(1, round(size[1] * factor))),)


@dataclasses.dataclass(frozen=True)
class RandomWindow(detection.GeometricTransform):
  """Crops `image` and its annotations to a random window; smaller images keep their side."""

  height: int
  width: int

  def plan(self, size: detection.Size, rng: np.random.Generator) -> Sequence[detection.Step]:
    window = min(self.height, size[0]), min(self.width, size[1])
    return (detection.random_window(size, window, rng),)


@dataclasses.dataclass(frozen=True)
class PadLabelMap(TargetTransform):
  """Adds `image_size` int32 [2]; pads `image` with 0, `label_map` with 255. The last transform."""

  height: int | None = None  # None leaves the padding to `data.loader.buckets`
  width: int | None = None

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    image, labels = pixels(example["image"]), example["label_map"]
    size = image.shape[:2]
    below, right = np.subtract(self.output_size(size, rng), size).tolist()
    if below < 0 or right < 0:
      problem = f"an image of {size[0]}x{size[1]} does not fit into {self.height}x{self.width}"
      raise ValueError(f"pad_label_map: {problem}; put random_window or resize_shorter before it")
    border = (0, below, 0, right, cv2.BORDER_CONSTANT)
    return {
      **example,
      "image": cv2.copyMakeBorder(image, *border, value=(0, 0, 0)),
      "label_map": cv2.copyMakeBorder(labels, *border, value=(IGNORE,)),
      "image_size": np.array(size, np.int32),
    }

  def output_size(self, size: detection.Size, _: np.random.Generator) -> detection.Size:
    return self.height or size[0], self.width or size[1]
