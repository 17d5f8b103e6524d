"""The first and the last transform of object detection: checked arrays, then padded targets."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from absl import logging
from faster_coco_eval.core import mask as run_lengths
from jaxtyping import Bool, Int

from vit_jax_zoo.data.sources.base import CorruptExampleError, Example
from vit_jax_zoo.data.transforms.base import Transform, pixels
from vit_jax_zoo.data.transforms.geometry import (
  GeometricTransform,
  Mirror,
  Scale,
  Size,
  Step,
  Window,
  clip,
  has_area,
  keep_objects,
)


@dataclasses.dataclass(frozen=True)
class RandomFlip(GeometricTransform):
  """Mirrors `image`, and what is marked in it, left to right with a probability."""

  name = "random_flip"

  probability: float = 0.5

  def plan(self, size: Size, rng: np.random.Generator) -> Sequence[Step]:
    """Returns the mirror, or nothing."""
    del size
    return (Mirror(),) if rng.random() < self.probability else ()


SHORTER_SIDES = tuple(range(480, 801, 32))
CROP_FROM = (400, 500, 600)
CROP_SIDES = (384, 600)


def scaled_size(size: Size, shorter: int, longest: int | None = None) -> Size:
  """Returns the size with another shorter side, smaller where the longer one would be too long.

  With DETR's rounding: where `longest` counts, the shorter side is rounded first, and the longer
  one follows from it, so that it may miss `longest` by a few pixels.
  """
  short, long = min(size), max(size)
  if longest is not None and long / short * shorter > longest:
    shorter = round(longest * short / long)
  if short == shorter:
    return size
  other = int(shorter * long / short)
  return (shorter, other) if size[0] <= size[1] else (other, shorter)


@dataclasses.dataclass(frozen=True)
class ResizeShorter(GeometricTransform):
  """Resizes `image`, and what is marked in it, to a given shorter side; keeps the aspect ratio.

  Attributes:
    shorter: the shorter side in pixels, or several of which one is drawn.
    longest: the longer side is no longer than that, or None.
  """

  name = "resize_shorter"

  shorter: int | Sequence[int] = 800
  longest: int | None = 1333

  def plan(self, size: Size, rng: np.random.Generator) -> Sequence[Step]:
    """Returns a scale."""
    return (_drawn_scale(size, self.shorter, self.longest, rng),)


@dataclasses.dataclass(frozen=True)
class RandomScaleCrop(GeometricTransform):
  """Draws a size for `image` and its marks; or first crops it, as often as not, at another size.

  Attributes:
    shorter: the shorter sides that the result may have.
    longest: its longer side is no longer than that, or None.
    crop_probability: how often it is cropped.
    crop_from: the shorter sides that the image may have when it is cropped.
    crop_sides: smallest and largest height and width of the crop; the largest is bounded by the
      image.
  """

  name = "random_scale_crop"

  shorter: Sequence[int] = SHORTER_SIDES
  longest: int | None = 1333
  crop_probability: float = 0.5
  crop_from: Sequence[int] = CROP_FROM
  crop_sides: Sequence[int] = CROP_SIDES

  def __post_init__(self) -> None:
    if not 0 <= self.crop_probability <= 1:
      raise ValueError(
        f"random_scale_crop: crop_probability must lie in [0, 1], got {self.crop_probability}"
      )

  def plan(self, size: Size, rng: np.random.Generator) -> Sequence[Step]:
    """Returns a scale; or a scale, a window and a scale."""
    steps: list[Step] = []
    if rng.random() < self.crop_probability:
      scale = _drawn_scale(size, self.crop_from, None, rng)
      low, high = self.crop_sides
      height, width = (
        int(rng.integers(min(low, side), min(high, side), endpoint=True)) for side in scale
      )
      top = int(rng.integers(scale.height - height, endpoint=True))
      left = int(rng.integers(scale.width - width, endpoint=True))
      steps += [scale, Window(top, left, height, width)]
      size = height, width
    return [*steps, _drawn_scale(size, self.shorter, self.longest, rng)]


def _drawn_scale(
  size: Size, shorter: int | Sequence[int], longest: int | None, rng: np.random.Generator
) -> Scale:
  choices = np.atleast_1d(shorter)
  return Scale(*scaled_size(size, int(choices[rng.integers(len(choices))]), longest))


@dataclasses.dataclass(frozen=True)
class KeepClasses(Transform):
  """Keeps the objects whose class ids lie below a limit: the things of data with things and stuff.

  `image` stays; of `labels` and the other keys of `data/objects.py` the rest goes. It comes behind
  `load_objects`.

  Attributes:
    below: the first class id that is left out.
  """

  name = "keep_classes"
  is_target = True

  below: int

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example without the others."""
    del rng
    return keep_objects(example, example["labels"] < self.below)

  def output_size(self, size: Size, rng: np.random.Generator) -> Size:
    """Returns the same size."""
    del rng
    return size


VOID = -1
"""In a segment map: a pixel that belongs to no object."""


def objects_example(
  image: bytes, image_id: int, boxes_xyxy: Any, labels: Any, *, is_crowd: Any, area: Any, ids: Any
) -> Example:
  """Returns the example's arrays, of the types that the module's docstring promises.

  Args:
    image: the file.
    image_id: its number.
    boxes_xyxy: n boxes in pixels.
    labels: n class ids.
    is_crowd: n booleans.
    area: n numbers of pixels.
    ids: n numbers of annotations.
  """
  return {
    "image": image,
    "image_id": int(image_id),
    "boxes_xyxy": np.asarray(boxes_xyxy, np.float32).reshape(-1, 4),
    "labels": np.asarray(labels, np.int32).reshape(-1),
    "is_crowd": np.asarray(is_crowd, bool).reshape(-1),
    "area": np.asarray(area, np.float32).reshape(-1),
    "object_ids": np.asarray(ids, np.int64).reshape(-1),
  }


def decode_segments(png: bytes, object_ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, "h w"]:
  """Returns which of the objects each pixel belongs to: their position in `object_ids`, or `VOID`.

  Args:
    png: an image whose colour is the id, red + 256 green + 65536 blue, and 0 where there is none;
      or one of a single channel that holds the id.
    object_ids: different from each other.

  Raises:
    CorruptExampleError: it cannot be decoded.
  """
  pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED) if png else None
  if pixels is None:
    raise CorruptExampleError(f"its segment image cannot be decoded ({len(png)} bytes)")
  ids = pixels.astype(np.int64)
  if ids.ndim == 3:
    ids = ids[..., 2] + 256 * ids[..., 1] + 65536 * ids[..., 0]
  if not len(object_ids):
    return np.full(ids.shape, VOID, np.int32)
  order = np.argsort(object_ids)
  place = np.searchsorted(object_ids, ids, sorter=order).clip(max=len(order) - 1)
  index = order[place]
  return np.where(object_ids[index] == ids, index, VOID).astype(np.int32)


def decode_outlines(
  outlines: Sequence[Any], height: int, width: int
) -> Bool[np.ndarray, "n {height} {width}"]:
  """Returns the pixels of each object.

  Args:
    outlines: for each a list of polygons, each a list x, y, x, y, ... in pixels; or COCO's run
      lengths, compressed or not, {"counts": ..., "size": [height, width]}.
    height: of the image.
    width: of the image.

  Raises:
    CorruptExampleError: an outline is neither, or of another size.
  """
  masks = np.zeros((len(outlines), height, width), bool)
  for mask, outline in zip(masks, outlines, strict=True):
    encoded = encode_outline(outline, height, width)
    if encoded is not None:
      mask[:] = run_lengths.decode(encoded)
  return masks


def encode_outline(outline: Any, height: int, width: int) -> dict[str, Any] | None:
  """Returns COCO's compressed run lengths of an outline; None for an empty one."""
  try:
    if isinstance(outline, dict):
      if tuple(outline["size"]) != (height, width):
        raise CorruptExampleError(
          f"an outline of {outline['size']} (height, width) is not the image's {height}x{width}"
        )
      counts = outline["counts"]
      if isinstance(counts, list):
        return _compress(outline, height, width)
      return {**outline, "counts": counts.encode() if isinstance(counts, str) else counts}
    polygons = [polygon for polygon in outline if len(polygon) >= 6]
    return run_lengths.merge(_compress(polygons, height, width)) if polygons else None
  except (KeyError, TypeError, RuntimeError) as error:
    raise CorruptExampleError(f"an outline cannot be read ({error})") from error


def _compress(outline: Any, height: int, width: int) -> Any:
  """Returns compressed run lengths: one for one, a list for a list of polygons."""
  return run_lengths.frPyObjects(outline, height, width)


REPORTED = 10
"""So many left-out objects are named in the log; from then on it is quiet."""


@dataclasses.dataclass(frozen=True)
class LoadObjects(Transform):
  """Decodes an image and what is marked in it, and leaves out what nothing can be learned from.

  Reads the keys of `data/objects.py`; writes `image` uint8 [h w 3], `original_size` int32 [2],
  height and width; and what its attributes ask for.

  For training, crowds are left out; boxes are clipped to the image, and those left out that are
  not both wide and high. The first ones of these are named in the log.

  Attributes:
    as_annotated: leave out and clip nothing, as scoring wants it.
    masks: add `masks` bool [n h w], from outlines or from the segment image.
    segment_map: add `segment_map` int32 [h w], the number of the object at each pixel of the
      original image, or -1 (`VOID`). From the segment image.
    run_lengths: add `run_lengths` uint8 of this length: the masks in the original image's pixels,
      as COCO's compressed run lengths, one object a line, zeros behind. For scoring masks.
  """

  name = "load_objects"
  is_target = True

  as_annotated: bool = False
  masks: bool = False
  segment_map: bool = False
  run_lengths: int | None = None

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example with arrays in the place of what was encoded."""
    del rng
    image = pixels(example["image"])
    size = image.shape[:2]
    example = {**example, "image": image, "original_size": np.array(size, np.int32)}
    outlines, png = example.pop("outlines", None), example.pop("segment_image", None)
    segments = decode_segments(png, example["object_ids"]) if png is not None else None
    self._check(example, size, has_masks=outlines is not None or segments is not None)
    if segments is not None and segments.shape != size:
      raise CorruptExampleError(f"its segment image is {segments.shape}, the image {size}")
    if self.masks:
      example["masks"] = _masks(outlines, segments, len(example["labels"]), size)
    if self.segment_map:
      if segments is None:
        raise ValueError("load_objects: segment_map needs panoptic data; set panoptic=True")
      example["segment_map"] = segments
    if self.run_lengths is not None:
      lines = _lines(outlines, segments, len(example["labels"]), size)
      example["run_lengths"] = _fixed_length(lines, self.run_lengths)
    return example if self.as_annotated else _sound(example, size)

  def output_size(self, size: Size, rng: np.random.Generator) -> Size:
    """Returns the same size."""
    del rng
    return size

  def _check(self, example: Example, size: Size, *, has_masks: bool) -> None:
    if (self.masks or self.run_lengths is not None) and not has_masks:
      raise ValueError(
        "load_objects: there are no outlines to make masks of; set masks=False, or use data that "
        "has them, such as coco:/path or panoptic=True"
      )
    if self.segment_map and not self.as_annotated:
      raise ValueError("load_objects: segment_map is for scoring; it needs as_annotated=True")
    annotated = example.pop("annotated_size", size)
    if tuple(annotated) != size:
      hint = "; is it rotated by its EXIF orientation?" if tuple(annotated) == size[::-1] else ""
      raise CorruptExampleError(
        f"the image is {size[0]}x{size[1]} pixels (height, width), and its annotations say "
        f"{annotated[0]}x{annotated[1]}{hint}"
      )


@dataclasses.dataclass(frozen=True)
class PadObjects(Transform):
  """Brings an image's objects to a fixed number of targets. The last transform of detection.

  Reads `image`, `boxes_xyxy` and the other keys of `data/objects.py`; writes `boxes_cxcywh`
  float32 [num 4], in shares of the image; `labels` int32, `is_target`, `is_crowd` bool and `area`
  float32 [num]; `masks` bool [num h w] if there are masks; `image_size` int32 [2]. Padding is 0.

  Attributes:
    num: how many targets; COCO's fullest image has 93 that are no crowds.
  """

  name = "pad_objects"
  is_target = True

  num: int = 100

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example with padded targets."""
    del rng
    example = dict(example)
    size, count = example["image"].shape[:2], len(example["labels"])
    if count > self.num:
      raise ValueError(f"{count} objects do not fit into pad_objects' num={self.num}; raise it")
    boxes = example.pop("boxes_xyxy") / np.array([size[1], size[0]] * 2, np.float32)
    example.pop("object_ids", None)
    example["boxes_cxcywh"] = np.concatenate(
      [(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1
    )
    example["is_target"] = np.ones(count, bool)
    example["image_size"] = np.array(size, np.int32)
    for key in ("boxes_cxcywh", "labels", "is_target", "is_crowd", "area", "masks"):
      if key in example:
        padded = np.zeros((self.num, *example[key].shape[1:]), example[key].dtype)
        padded[:count] = example[key]
        example[key] = padded
    return example

  def output_size(self, size: Size, rng: np.random.Generator) -> Size:
    """Returns the same size."""
    del rng
    return size


def _sound(example: Example, size: Size) -> Example:
  """Returns the example with those objects that a detector can learn."""
  example["boxes_xyxy"] = clip(example["boxes_xyxy"], *size)
  sound = has_area(example["boxes_xyxy"])
  for i in np.flatnonzero(~sound & ~example["is_crowd"]):
    logging.log_first_n(
      logging.WARNING,
      "image %d: left out object %d, whose box has no area in the image",
      REPORTED,
      example["image_id"],
      example["object_ids"][i] or i,
    )
  return keep_objects(example, sound & ~example["is_crowd"])


def _masks(
  outlines: list | None, segments: np.ndarray | None, count: int, size: Size
) -> np.ndarray:
  if segments is not None:
    return segments == np.arange(count)[:, None, None]
  return decode_outlines(outlines or [], *size)


def _lines(
  outlines: list | None, segments: np.ndarray | None, count: int, size: Size
) -> list[bytes]:
  """Returns the compressed run lengths of each object."""
  if segments is not None:
    masks = np.asfortranarray(_masks(None, segments, count, size).transpose(1, 2, 0), np.uint8)
    return [mask["counts"] for mask in run_lengths.encode(masks)] if count else []
  empty = np.zeros(size, np.uint8, order="F")
  encoded = [encode_outline(outline, *size) for outline in outlines or []]
  return [(mask or run_lengths.encode(empty))["counts"] for mask in encoded]


def _fixed_length(lines: list[bytes], length: int) -> np.ndarray:
  data = b"".join(line + b"\n" for line in lines)
  if len(data) > length:
    raise ValueError(f"its run lengths take {len(data)} bytes; raise run_lengths above {length}")
  return np.frombuffer(data.ljust(length, b"\0"), np.uint8)
