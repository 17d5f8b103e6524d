"""Transforms of object detection, instance and panoptic segmentation.

Sources give, for n objects, `image`, `image_id`, and

    boxes_xyxy   float32 [n 4], in pixels of the image, without which they follow from the segments
    labels       int32 [n], class ids
    is_crowd     bool [n]
    area         float32 [n], in pixels
    object_ids   int64 [n]
    outlines     optional: polygons or run lengths of each object as COCO has them, None without
    segment_image            optional: bytes of a PNG file whose colors are object ids
    file_image_id            optional: id in the annotation file where `image_id` is an index
    annotated_size           optional: height and width for which the objects were annotated
    annotation_orientation   optional: EXIF orientation to apply to the annotations

`load_objects` decodes them, geometric transforms move them, `pad_objects` makes fixed shapes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import scipy.ndimage
from absl import logging
from faster_coco_eval.core import mask as run_lengths
from jaxtyping import Bool, Float, Int

from vit_jax_zoo.data.images import orient, orient_boxes
from vit_jax_zoo.data.sources.base import CorruptExampleError, Example, Source
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

VOID = -1
"""In a segment map: a pixel of no object."""

SHORTER_SIDES = tuple(range(480, 801, 32))
CROP_FROM = (400, 500, 600)
CROP_SIDES = (384, 600)

MAX_OBJECTS = 100
"""Room for objects where the data does not give a number; COCO's fullest image has 93 targets."""


def objects_example(
  image: bytes, image_id: int, boxes_xyxy: Any, labels: Any, *, is_crowd: Any, area: Any, ids: Any
) -> Example:
  """Returns the example with arrays of the types above."""
  return {
    "image": image,
    "image_id": int(image_id),
    "boxes_xyxy": np.asarray(boxes_xyxy, np.float32).reshape(-1, 4),
    "labels": np.asarray(labels, np.int32).reshape(-1),
    "is_crowd": np.asarray(is_crowd, bool).reshape(-1),
    "area": np.asarray(area, np.float32).reshape(-1),
    "object_ids": np.asarray(ids, np.int64).reshape(-1),
  }


@dataclasses.dataclass(frozen=True)
class LoadObjects(Transform):
  """Decodes `image` and its annotations: the first transform of detection.

  Writes `image` uint8 [h w 3], `original_size` int32 [2] (height, width), and what the attributes
  name. Annotations of the stored frame are rotated with the image (EXIF).

  For training, crowds are left out, boxes are clipped to the image, and boxes without area are left
  out; the first of these are logged. Objects without an outline are left out where masks are used,
  and segments without a pixel always.

  Attributes:
    as_annotated: keep crowds and boxes as annotated, for scoring.
    masks: add `masks` bool [n h w], from outlines or segments.
    segment_map: add `segment_map` int32 [h w], the index of the object at each pixel of the
      original image, or -1 (`VOID`). From segments.
    run_lengths: add `run_lengths` uint8 of this length: the masks of the original image as COCO's
      compressed run lengths, one object a line, padded with zeros. For scoring masks.
  """

  name = "load_objects"
  is_target = True

  as_annotated: bool = False
  masks: bool = False
  segment_map: bool = False
  run_lengths: int | None = None

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the decoded example."""
    del rng
    image = pixels(example["image"])
    size = image.shape[:2]
    example = {**example, "image": image, "original_size": np.array(size, np.int32)}
    turn = example.pop("annotation_orientation", 1)
    stored = size[::-1] if turn >= 5 else size
    _check_size(example.pop("annotated_size", stored), stored)
    outlines, png = example.pop("outlines", None), example.pop("segment_image", None)
    self._check_fields(has_masks=outlines is not None or png is not None, has_segments=bool(png))
    if "boxes_xyxy" in example:
      example["boxes_xyxy"] = orient_boxes(example["boxes_xyxy"], turn, *size)
    if png is not None:
      segments = decode_segments(png, example["object_ids"])
      if segments.shape != stored:
        raise CorruptExampleError(f"segment image is {segments.shape}, its image {stored}")
      example = self._add_segments(example, np.ascontiguousarray(orient(segments, turn)))
    elif outlines is not None and (self.masks or self.run_lengths is not None):
      example = self._add_outlines(example, outlines, turn, stored)
    example = example if self.as_annotated else _trainable(example, size)
    example.pop("file_image_id", None)
    return example

  def output_size(self, size: Size, rng: np.random.Generator) -> Size:
    """Returns the same size."""
    del rng
    return size

  def _add_segments(self, example: Example, segments: Int[np.ndarray, "h w"]) -> Example:
    """Adds boxes where there are none, masks, and the segment map."""
    boxes, exist = _boxes_of(segments, len(example["labels"]))
    example.setdefault("boxes_xyxy", boxes)
    if not exist.all():
      _log_left_out(example, ~exist, "has no pixel in the segment image")
      example = keep_objects(example, exist)
      number = np.append(np.cumsum(exist) - 1, VOID).astype(np.int32)
      segments = number[segments]  # VOID is the last
    if self.masks:
      example["masks"] = segments == np.arange(len(example["labels"]))[:, None, None]
    if self.segment_map:
      example["segment_map"] = segments
    if self.run_lengths is not None:
      masks = segments == np.arange(len(example["labels"]))[:, None, None]
      example["run_lengths"] = _lines(_encode(masks), self.run_lengths)
    return example

  def _add_outlines(
    self, example: Example, outlines: Sequence[Any], turn: int, stored: Size
  ) -> Example:
    """Adds masks and run lengths of the objects that have an outline."""
    example = keep_objects(example, np.array([o is not None for o in outlines], bool))
    outlines = [outline for outline in outlines if outline is not None]
    if self.masks:
      masks = orient(decode_outlines(outlines, *stored), turn, (1, 2))
      example["masks"] = np.ascontiguousarray(masks)
    if self.run_lengths is not None:
      encoded = _encode_outlines(outlines, *stored)
      if turn != 1:
        encoded = _encode(orient(decode_outlines(outlines, *stored), turn, (1, 2)))
      example["run_lengths"] = _lines(encoded, self.run_lengths)
    return example

  def _check_fields(self, *, has_masks: bool, has_segments: bool) -> None:
    if (self.masks or self.run_lengths is not None) and not has_masks:
      raise ValueError(
        "load_objects: no object has an outline to make masks of; set masks=False, or use data "
        "with segmentation, such as coco:/path or panoptic=True"
      )
    if self.segment_map and not has_segments:
      raise ValueError("load_objects: segment_map needs panoptic data; set panoptic=True")
    if self.segment_map and not self.as_annotated:
      raise ValueError("load_objects: segment_map is for scoring; it needs as_annotated=True")


@dataclasses.dataclass(frozen=True)
class KeepClasses(Transform):
  """Drops objects whose class id in `labels` is at or above a limit, after `load_objects`.

  With things and stuff, the things remain.

  Attributes:
    below: first class id that is dropped.
  """

  name = "keep_classes"
  is_target = True

  below: int

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example with the remaining objects."""
    del rng
    return keep_objects(example, example["labels"] < self.below)

  def output_size(self, size: Size, rng: np.random.Generator) -> Size:
    """Returns the same size."""
    del rng
    return size


@dataclasses.dataclass(frozen=True)
class RandomFlip(GeometricTransform):
  """Mirrors `image` and its annotations left to right with a probability."""

  name = "random_flip"

  probability: float = 0.5

  def plan(self, size: Size, rng: np.random.Generator) -> Sequence[Step]:
    """Returns the mirror, or nothing."""
    del size
    return (Mirror(),) if rng.random() < self.probability else ()


@dataclasses.dataclass(frozen=True)
class ResizeShorter(GeometricTransform):
  """Resizes `image` and its annotations to a shorter side, keeping the aspect ratio.

  Attributes:
    shorter: shorter side in pixels, or several of which one is drawn.
    longest: limit of the longer side, or None.
  """

  name = "resize_shorter"

  shorter: int | Sequence[int] = 800
  longest: int | None = 1333

  def plan(self, size: Size, rng: np.random.Generator) -> Sequence[Step]:
    """Returns a scale."""
    return (_drawn_scale(size, self.shorter, self.longest, rng),)


@dataclasses.dataclass(frozen=True)
class RandomScaleCrop(GeometricTransform):
  """DETR's augmentation of `image` and its annotations: a random size, half the time after a crop.

  Attributes:
    shorter: shorter sides of the result, of which one is drawn.
    longest: limit of its longer side, or None.
    crop_probability: of the crop.
    crop_from: shorter sides of the image that is cropped, of which one is drawn.
    crop_sides: smallest and largest height and width of the crop, bounded by the image.
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
        f"random_scale_crop: crop_probability is {self.crop_probability}; expected [0, 1]"
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


def scaled_size(size: Size, shorter: int, longest: int | None = None) -> Size:
  """Returns the size with another shorter side, smaller if the longer one would exceed `longest`.

  With DETR's rounding: where `longest` applies, the shorter side is rounded first and the longer
  one follows from it, and may miss `longest` by a few pixels.
  """
  short, long = min(size), max(size)
  if longest is not None and long / short * shorter > longest:
    shorter = round(longest * short / long)
  if short == shorter:
    return size
  other = int(shorter * long / short)
  return (shorter, other) if size[0] <= size[1] else (other, shorter)


def _drawn_scale(
  size: Size, shorter: int | Sequence[int], longest: int | None, rng: np.random.Generator
) -> Scale:
  choices = np.atleast_1d(shorter)
  return Scale(*scaled_size(size, int(choices[rng.integers(len(choices))]), longest))


@dataclasses.dataclass(frozen=True)
class PadObjects(Transform):
  """Pads an image's objects to a fixed number of targets: the last transform of detection.

  Reads `image`, `boxes_xyxy` and the other keys of objects; writes `boxes_cxcywh` float32 [num 4]
  relative to the image; `labels` int32, `is_target`, `is_crowd` bool and `area` float32 [num];
  `masks` bool [num h w] if there are masks; `image_size` int32 [2]. Padding is 0.

  Attributes:
    num: number of targets; None is the largest count in the data, or 100 where it is unknown.
  """

  name = "pad_objects"
  is_target = True

  num: int | None = None

  def for_source(self, source: Source) -> Transform:
    """Returns the transform with room for the source's fullest image."""
    largest = source.info.max_objects
    if self.num is None and largest is not None:
      return dataclasses.replace(self, num=max(1, largest))
    return self

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example with padded targets."""
    del rng
    example, num = dict(example), self.num or MAX_OBJECTS
    size, count = example["image"].shape[:2], len(example["labels"])
    if count > num:
      raise ValueError(f"{count} objects do not fit into pad_objects' num={num}; raise it")
    boxes = example.pop("boxes_xyxy") / np.array([size[1], size[0]] * 2, np.float32)
    example.pop("object_ids", None)
    example["boxes_cxcywh"] = np.concatenate(
      [(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1
    )
    example["is_target"] = np.ones(count, bool)
    example["image_size"] = np.array(size, np.int32)
    for key in ("boxes_cxcywh", "labels", "is_target", "is_crowd", "area", "masks"):
      if key in example:
        padded = np.zeros((num, *example[key].shape[1:]), example[key].dtype)
        padded[:count] = example[key]
        example[key] = padded
    return example

  def output_size(self, size: Size, rng: np.random.Generator) -> Size:
    """Returns the same size."""
    del rng
    return size


def _check_size(annotated: Sequence[int], stored: Size) -> None:
  if tuple(annotated) != stored:
    hint = "; exif_frame" if tuple(annotated) == stored[::-1] else ""
    hint = hint and f"{hint} of the source sets the frame of images that are rotated by EXIF"
    raise CorruptExampleError(
      f"the image is {stored[0]}x{stored[1]} pixels (height x width), its annotations are for "
      f"{annotated[0]}x{annotated[1]}{hint}"
    )


def _trainable(example: Example, size: Size) -> Example:
  """Returns the example with the objects that a detector can learn."""
  example["boxes_xyxy"] = clip(example["boxes_xyxy"], *size)
  good = has_area(example["boxes_xyxy"])
  _log_left_out(example, ~good & ~example["is_crowd"], "has a box without area in the image")
  return keep_objects(example, good & ~example["is_crowd"])


_LOGGED = 10
"""Objects left out that are logged; later ones are not."""


def _log_left_out(example: Example, which: Bool[np.ndarray, " n"], reason: str) -> None:
  for i in np.flatnonzero(which):
    number = example["object_ids"][i] or i
    text = "image %s: object %d %s, and is left out"
    image = example.get("file_image_id", example["image_id"])
    logging.log_first_n(logging.WARNING, text, _LOGGED, image, number, reason)


def decode_segments(png: bytes, object_ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, "h w"]:
  """Returns the index in `object_ids` of the object at each pixel, or `VOID`.

  Args:
    png: an image whose color is the id, red + 256 green + 65536 blue, or 0 for none; or one of a
      single channel with the ids.
    object_ids: all different.

  Raises:
    CorruptExampleError: it cannot be decoded.
  """
  image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED) if png else None
  if image is None:
    raise CorruptExampleError(f"segment image cannot be decoded ({len(png)} bytes)")
  ids = image.astype(np.int64)
  if ids.ndim == 3:
    ids = ids[..., 2] + 256 * ids[..., 1] + 65536 * ids[..., 0]
  if not len(object_ids):
    return np.full(ids.shape, VOID, np.int32)
  order = np.argsort(object_ids)
  place = np.searchsorted(object_ids, ids, sorter=order).clip(max=len(order) - 1)
  index = order[place]
  return np.where(object_ids[index] == ids, index, VOID).astype(np.int32)


def _boxes_of(
  segments: Int[np.ndarray, "h w"], count: int
) -> tuple[Float[np.ndarray, "n 4"], Bool[np.ndarray, " n"]]:
  """Returns the segments' boxes, as DETR's `masks_to_boxes`, and which segments have a pixel."""
  boxes = np.zeros((count, 4), np.float32)
  exist = np.zeros(count, bool)
  for i, found in enumerate(scipy.ndimage.find_objects(segments + 1, max_label=count)):
    if found is not None:
      rows, columns = found
      boxes[i] = columns.start, rows.start, columns.stop - 1, rows.stop - 1
      exist[i] = True
  return boxes, exist


def decode_outlines(
  outlines: Sequence[Any], height: int, width: int
) -> Bool[np.ndarray, "n {height} {width}"]:
  """Returns the pixels of each object.

  Args:
    outlines: of each object a list of polygons x, y, x, y, ... in pixels, or COCO's run lengths,
      compressed or not: {"counts": ..., "size": [height, width]}.
    height: of the image.
    width: of the image.

  Raises:
    CorruptExampleError: an outline is neither, or of another size.
  """
  masks = np.zeros((len(outlines), height, width), bool)
  for mask, encoded in zip(masks, _encode_outlines(outlines, height, width), strict=True):
    mask[:] = run_lengths.decode(encoded)
  return masks


def _encode_outlines(outlines: Sequence[Any], height: int, width: int) -> list[dict[str, Any]]:
  """Returns COCO's compressed run lengths of each object."""
  return [_encode_outline(outline, height, width) for outline in outlines]


def _encode_outline(outline: Any, height: int, width: int) -> Any:
  try:
    if isinstance(outline, dict):
      if tuple(outline["size"]) != (height, width):
        raise CorruptExampleError(
          f"an outline of {outline['size']} (height, width) is not the image's {height}x{width}"
        )
      counts = outline["counts"]
      if isinstance(counts, list):
        return run_lengths.frPyObjects(outline, height, width)
      return {**outline, "counts": counts.encode() if isinstance(counts, str) else counts}
    polygons = [polygon for polygon in outline if len(polygon) >= 6]
    if not polygons:
      return _encode(np.zeros((1, height, width), bool))[0]
    parts: Any = run_lengths.frPyObjects(polygons, height, width)
    return run_lengths.merge(parts)
  except (KeyError, TypeError, ValueError, RuntimeError) as error:
    if isinstance(error, CorruptExampleError):
      raise
    raise CorruptExampleError(f"an outline cannot be read ({error})") from error


def _encode(masks: Bool[np.ndarray, "n h w"]) -> Any:
  """Returns COCO's compressed run lengths of each mask, a list of dicts."""
  if not len(masks):
    return []
  return run_lengths.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8))


def _lines(encoded: Sequence[dict[str, Any]], length: int) -> np.ndarray:
  """Returns run lengths as lines of text, padded with zeros to `length` bytes."""
  data = b"".join(mask["counts"] + b"\n" for mask in encoded)
  if len(data) > length:
    raise ValueError(
      f"run lengths of {len(encoded)} objects take {len(data)} bytes; raise load_objects' "
      f"run_lengths above {length}"
    )
  return np.frombuffer(data.ljust(length, b"\0"), np.uint8)
