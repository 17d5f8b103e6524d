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

Geometric transforms move `boxes_xyxy`, `masks` bool [n h w] and `label_map` [h w] with the image. A
crop drops objects without area in it. `area` remains as annotated, and `segment_map` that of the
original image, for scoring. Their steps are planned from the image's size only, so that the size
of the result is known before any image is read (`data/buckets.py`).
"""

import abc
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import cv2
import numpy as np
import scipy.ndimage
from absl import logging
from faster_coco_eval.core import mask as run_lengths
from jaxtyping import Bool, Float, Int, Num
from PIL import Image

from vit_jax_zoo.data.images import bounded_size, image_size, orient, orient_boxes
from vit_jax_zoo.data.sources.base import CorruptExampleError, Example, Source
from vit_jax_zoo.data.transforms import TargetTransform, Transform, pixels

Size: TypeAlias = tuple[int, int]  # height and width in pixels
VOID = -1  # in a segment map: a pixel of no object

SHORTER_SIDES = tuple(range(480, 801, 32))
MAX_OBJECTS = 100  # where the data gives no number; COCO's fullest image has 93 targets
_PER_OBJECT = ("boxes_xyxy", "labels", "is_crowd", "area", "object_ids", "masks")
_LOGGED = 10  # maximum number of log lines about objects left out


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
class LoadObjects(TargetTransform):
  """Decodes `image` and its annotations: the first transform of detection.

  Writes `image` uint8 [h w 3], `original_size` int32 [2] (height, width), and what the fields name.
  Annotations of the stored frame are rotated with the image (EXIF).

  For training, crowds are left out, boxes are clipped to the image, and boxes without area are left
  out; the first of these are logged. Objects whose outline is absent or has no pixel are left out
  where masks are used, and segments without a pixel always.
  """

  as_annotated: bool = False  # keep crowds and boxes as annotated, for scoring
  masks: bool = False  # add `masks` bool [n h w], from outlines or segments
  segment_map: bool = False  # add `segment_map` int32 [h w]: each original pixel's object or `VOID`
  # Add `run_lengths` uint8 of this length: the masks of the original image as COCO's compressed run
  # lengths, one object a line, padded with zeros. For scoring masks.
  run_lengths: int | None = None

  def __call__(self, example: Example, _: np.random.Generator) -> Example:
    image = pixels(example["image"])
    size = image.shape[:2]
    example = {**example, "image": image, "original_size": np.array(size, np.int32)}
    turn = example.pop("annotation_orientation", 1)
    stored = size[::-1] if turn >= 5 else size
    _check_size(example.pop("annotated_size", stored), stored)
    outlines, png = example.pop("outlines", None), example.pop("segment_image", None)
    self._check_fields(outlines, png)
    if "boxes_xyxy" in example:
      example["boxes_xyxy"] = orient_boxes(example["boxes_xyxy"], turn, *size)
    if png is not None:
      segments = decode_segments(png, example)
      if segments.shape != stored:
        raise CorruptExampleError(f"segment image is {segments.shape}, its image {stored}")
      example = self._add_segments(example, np.ascontiguousarray(orient(segments, turn)))
    elif outlines is not None and (self.masks or self.run_lengths is not None):
      example = self._add_outlines(example, outlines, turn, stored)
    if not self.as_annotated:
      example["boxes_xyxy"] = _clip(example["boxes_xyxy"], *size)
      good, is_crowd = _has_area(example["boxes_xyxy"]), example["is_crowd"]
      _log_left_out(example, ~good & ~is_crowd, "has a box without area in the image")
      example = keep_objects(example, good & ~is_crowd)
    example.pop("file_image_id", None)
    return example

  def _add_segments(self, example: Example, segments: Int[np.ndarray, "h w"]) -> Example:
    boxes, exist = _boxes_of(segments, len(example["labels"]))
    example.setdefault("boxes_xyxy", boxes)
    if not exist.all():
      _log_left_out(example, ~exist, "has no pixel in the segment image")
      example = keep_objects(example, exist)
      number = np.append(np.cumsum(exist) - 1, VOID).astype(np.int32)
      segments = number[segments]  # VOID is the last
    if self.segment_map:
      example["segment_map"] = segments
    if self.masks or self.run_lengths is not None:
      self._add_masks(example, segments == np.arange(len(example["labels"]))[:, None, None])
    return example

  def _add_outlines(self, example: Example, outlines: Any, turn: int, stored: Size) -> Example:
    example = keep_objects(example, np.array([o is not None for o in outlines], bool))
    encoded = [_encode_outline(o, *stored) for o in outlines if o is not None]
    exist = np.array([run_lengths.area(code) > 0 for code in encoded], bool)
    _log_left_out(example, ~exist, "has an outline without a pixel in the image")
    example, encoded = keep_objects(example, exist), list(itertools.compress(encoded, exist))
    if not self.masks and turn == 1:
      return {**example, "run_lengths": _lines(encoded, self.run_lengths or 0)}
    masks = np.array([run_lengths.decode(code) for code in encoded], bool).reshape(-1, *stored)
    self._add_masks(example, np.ascontiguousarray(orient(masks, turn, (1, 2))))
    return example

  def _add_masks(self, example: Example, masks: Bool[np.ndarray, "n h w"]) -> None:
    if self.masks:
      example["masks"] = masks
    if self.run_lengths is not None:
      encoded: Any = run_lengths.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8))
      example["run_lengths"] = _lines(encoded, self.run_lengths)

  def _check_fields(self, outlines: Any, png: bytes | None) -> None:
    if (self.masks or self.run_lengths is not None) and outlines is None and png is None:
      remedy = "set masks=False, or use data with segmentation, such as panoptic=True"
      raise ValueError(f"load_objects: no outlines or segments in the data; {remedy}")
    if self.segment_map and png is None:
      raise ValueError("load_objects: segment_map needs panoptic data; set panoptic=True")
    if self.segment_map and not self.as_annotated:
      raise ValueError("load_objects: segment_map is for scoring; it needs as_annotated=True")


def _check_size(annotated: Sequence[int], stored: Size) -> None:
  if tuple(annotated) != stored:
    hint = "; swap them in the file or, if EXIF rotates the image, set exif_frame of the source"
    expected = f"{annotated[0]}x{annotated[1]}{hint if tuple(annotated) == stored[::-1] else ''}"
    size = f"{stored[0]}x{stored[1]} pixels (height x width)"
    raise CorruptExampleError(f"the image is {size}, its annotations are for {expected}")


def _log_left_out(example: Example, which: Bool[np.ndarray, " n"], reason: str) -> None:
  for i in np.flatnonzero(which):
    number = example["object_ids"][i] or i
    text = "image %s: object %d %s, and is left out"
    image = example.get("file_image_id", example["image_id"])
    logging.log_first_n(logging.WARNING, text, _LOGGED, image, number, reason)


def decode_segments(png: bytes, example: Example) -> Int[np.ndarray, "h w"]:
  """Returns the index in `object_ids`, all different, of the object at each pixel, or `VOID`.

  The image's color is the id, red + 256 green + 65536 blue, or 0 for none; or it has a single
  channel with the ids. The first ids of no object are logged. CorruptExampleError if it cannot be
  decoded.
  """
  object_ids = example["object_ids"]
  if png.startswith(b"\xff\xd8"):
    raise CorruptExampleError("segment image is JPEG, which changes ids; expected a PNG file")
  try:
    image_size(png)  # refuses sizes above the limit by the header
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
  except (CorruptExampleError, cv2.error) as error:
    raise CorruptExampleError(f"segment image cannot be decoded: {error}") from None
  if image is None:
    raise CorruptExampleError(f"segment image cannot be decoded ({len(png)} bytes)")
  ids = image.astype(np.int64)
  if ids.ndim == 3:
    ids = ids[..., 2] + 256 * ids[..., 1] + 65536 * ids[..., 0]
  known = np.append(object_ids, 0)
  order = np.argsort(known)
  index = order[np.searchsorted(known, ids, sorter=order).clip(max=len(object_ids))]
  index[index == len(object_ids)] = VOID
  is_known = known[index] == ids
  if not is_known.all():
    unknown, counts = np.unique(ids[~is_known], return_counts=True)
    logging.log_first_n(
      logging.WARNING,
      "image %s: %d colors of its segment image have no annotation (%d pixels; ids %s), and are "
      "void", _LOGGED, example.get("file_image_id", example["image_id"]),
      len(unknown), counts.sum(), ", ".join(map(str, unknown[:5])),
    )  # fmt: skip
  return np.where(is_known, index, VOID).astype(np.int32)


def _boxes_of(
  segments: Int[np.ndarray, "h w"], count: int
) -> tuple[Float[np.ndarray, "n 4"], Bool[np.ndarray, " n"]]:
  boxes, exist = np.zeros((count, 4), np.float32), np.zeros(count, bool)
  for i, found in enumerate(scipy.ndimage.find_objects(segments + 1, max_label=count)):
    if found is not None:
      rows, columns = found
      boxes[i] = columns.start, rows.start, columns.stop - 1, rows.stop - 1
      exist[i] = True
  return boxes, exist


def _encode_outline(outline: Any, height: int, width: int) -> Any:
  """Returns COCO's compressed run lengths of polygons x, y, x, y, ... or of COCO's run lengths."""
  try:
    if isinstance(outline, dict):
      if tuple(outline["size"]) != (height, width):
        found = f"an outline of {outline['size']} (height, width)"
        raise CorruptExampleError(f"{found} is not the image's {height}x{width}")
      counts = outline["counts"]
      if isinstance(counts, list):
        return run_lengths.frPyObjects(outline, height, width)
      return {**outline, "counts": counts.encode() if isinstance(counts, str) else counts}
    polygons = [polygon for polygon in outline if len(polygon) >= 6]
    if not polygons:
      return run_lengths.encode(np.zeros((height, width), np.uint8, order="F"))
    parts: Any = run_lengths.frPyObjects(polygons, height, width)
    return run_lengths.merge(parts)
  except CorruptExampleError:
    raise
  except (KeyError, TypeError, ValueError, RuntimeError) as error:
    raise CorruptExampleError(f"an outline cannot be read ({error})") from error


def _lines(encoded: Sequence[dict[str, Any]], length: int) -> np.ndarray:
  """Returns run lengths as lines of text, padded with zeros to `length` bytes."""
  data = b"".join(mask["counts"] + b"\n" for mask in encoded)
  if len(data) > length:
    need = f"run lengths of {len(encoded)} objects take {len(data)} bytes"
    raise ValueError(f"{need}; raise load_objects' run_lengths above {length}")
  return np.frombuffer(data.ljust(length, b"\0"), np.uint8)


def keep_objects(example: Example, keep: Bool[np.ndarray, " n"]) -> Example:
  """Returns the example with the objects where `keep` is True."""
  if keep.all():
    return example
  selected = {key: example[key][keep] for key in _PER_OBJECT if key in example}
  if "run_lengths" in example:
    text = example["run_lengths"].tobytes()
    kept = b"".join(itertools.compress(text.rstrip(b"\0").splitlines(keepends=True), keep))
    selected["run_lengths"] = np.frombuffer(kept.ljust(len(text), b"\0"), np.uint8)
  return example | selected


@dataclasses.dataclass(frozen=True)
class KeepClasses(TargetTransform):
  """Drops objects of stuff: those whose class id in `labels` is at or above a limit."""

  below: int  # first class id that is dropped

  def __call__(self, example: Example, _: np.random.Generator) -> Example:
    return keep_objects(example, example["labels"] < self.below)


class Mirror(NamedTuple):
  """Horizontal flip."""

  def __call__(self, example: Example) -> Example:
    example = {**example, "image": cv2.flip(example["image"], 1)}
    if "boxes_xyxy" in example:
      left, top, right, bottom = example["boxes_xyxy"].T
      width = np.float32(example["image"].shape[1])
      example["boxes_xyxy"] = np.stack([width - right, top, width - left, bottom], axis=1)
    return example | {k: example[k][..., ::-1] for k in ("masks", "label_map") if k in example}


class Scale(NamedTuple):
  """Resize to a size, with Pillow's antialiased bilinear filter.

  Masks take the pixel whose index is rounded down, as torch's "nearest"; label maps the pixel that
  has the new pixel's center.
  """

  height: int
  width: int

  def __call__(self, example: Example) -> Example:
    before = example["image"].shape[:2]
    bounded_size(*self)
    if before == tuple(self):
      return example
    image = Image.fromarray(np.ascontiguousarray(example["image"], np.uint8))
    example = {**example, "image": np.asarray(image.resize(self[::-1], Image.Resampling.BILINEAR))}
    if "boxes_xyxy" in example:
      scale = np.array([self.width / before[1], self.height / before[0]] * 2, np.float32)
      example["boxes_xyxy"] = example["boxes_xyxy"] * scale
    if "masks" in example:
      rows, columns = (
        (np.arange(new, dtype=np.float32) * np.float32(old / new)).astype(int).clip(max=old - 1)
        for old, new in zip(before, self, strict=True)
      )
      example["masks"] = example["masks"][:, rows][:, :, columns]
    if "label_map" in example:
      labels = Image.fromarray(example["label_map"])
      example["label_map"] = np.asarray(labels.resize(self[::-1], Image.Resampling.NEAREST))
    return example


class Window(NamedTuple):
  """Crop to a window."""

  top: int
  left: int
  height: int
  width: int

  def __call__(self, example: Example) -> Example:
    top, left, height, width = self
    rows, columns = slice(top, top + height), slice(left, left + width)
    example = {**example, "image": example["image"][rows, columns]}
    example |= {k: example[k][..., rows, columns] for k in ("masks", "label_map") if k in example}
    if "boxes_xyxy" not in example:
      return example
    corner = np.array([left, top] * 2, np.float32)
    example["boxes_xyxy"] = _clip(example["boxes_xyxy"] - corner, height, width)
    return keep_objects(example, _has_area(example["boxes_xyxy"]))


def _clip(boxes_xyxy: Num[np.ndarray, "n 4"], height: int, width: int) -> Num[np.ndarray, "n 4"]:
  return np.clip(boxes_xyxy, 0, np.array([width, height, width, height], np.float32))


def _has_area(boxes_xyxy: Num[np.ndarray, "n 4"]) -> Bool[np.ndarray, " n"]:
  left, top, right, bottom = boxes_xyxy.T
  return (right > left) & (bottom > top)


Step: TypeAlias = Mirror | Scale | Window


@dataclasses.dataclass(frozen=True)
class GeometricTransform(Transform):
  """A transform that moves pixels, and the annotations with them."""

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    example = {**example, "image": pixels(example["image"])}
    for step in self.plan(example["image"].shape[:2], rng):
      example = step(example)
    return example

  def output_size(self, size: Size, rng: np.random.Generator) -> Size:
    for step in self.plan(size, rng):
      size = size if isinstance(step, Mirror) else (step.height, step.width)
    return size

  @abc.abstractmethod
  def plan(self, size: Size, rng: np.random.Generator, /) -> Sequence[Step]:
    """Returns the steps for an image of this size."""


@dataclasses.dataclass(frozen=True)
class RandomFlip(GeometricTransform):
  """Mirrors `image` and its annotations left to right with a probability."""

  probability: float = 0.5

  def plan(self, _: Size, rng: np.random.Generator) -> Sequence[Step]:
    return (Mirror(),) if rng.random() < self.probability else ()


@dataclasses.dataclass(frozen=True)
class ResizeShorter(GeometricTransform):
  """Resizes `image` and its annotations to a shorter side, keeping the aspect ratio."""

  shorter: int | Sequence[int] = 800  # in pixels, or several sides of which one is drawn
  longest: int | None = 1333  # limit of the longer side

  def plan(self, size: Size, rng: np.random.Generator) -> Sequence[Step]:
    return (_drawn_scale(size, self.shorter, self.longest, rng),)


@dataclasses.dataclass(frozen=True)
class RandomScaleCrop(GeometricTransform):
  """DETR's augmentation of `image` and annotations: a random size, half the time after a crop."""

  shorter: Sequence[int] = SHORTER_SIDES  # of the result: one is drawn uniformly
  longest: int | None = 1333  # limit of its longer side
  crop_probability: float = 0.5
  crop_from: Sequence[int] = (400, 500, 600)  # shorter sides of the image that is cropped
  crop_sides: Sequence[int] = (384, 600)  # smallest and largest side, bounded by the image

  def __post_init__(self) -> None:
    self.check_limits("crop_sides", np.inf)
    self.check("crop_from", min(self.crop_from, default=0) > 0, "sides above 0")

  def plan(self, size: Size, rng: np.random.Generator) -> Sequence[Step]:
    steps: list[Step] = []
    if rng.random() < self.crop_probability:
      scale = _drawn_scale(size, self.crop_from, None, rng)
      low, high = self.crop_sides
      size = (
        int(rng.integers(min(low, scale.height), min(high, scale.height), endpoint=True)),
        int(rng.integers(min(low, scale.width), min(high, scale.width), endpoint=True)),
      )
      steps = [scale, random_window(scale, size, rng)]
    return [*steps, _drawn_scale(size, self.shorter, self.longest, rng)]


def random_window(size: Size, window: Size, rng: np.random.Generator) -> Window:
  """Returns a window of height and width `window`, drawn uniformly, in an image of `size`."""
  top = int(rng.integers(size[0] - window[0], endpoint=True))
  return Window(top, int(rng.integers(size[1] - window[1], endpoint=True)), *window)


def scaled_size(size: Size, shorter: int, longest: int | None = None) -> Size:
  """Returns the size with another shorter side, smaller if the longer one would exceed `longest`.

  With DETR's rounding: where `longest` applies, the shorter side is rounded first and the longer
  one follows from it, and may miss `longest` by a few pixels.
  """
  short, long = min(size), max(size)
  if longest is not None and long / short * shorter > longest:
    shorter = max(1, round(longest * short / long))
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
class PadObjects(TargetTransform):
  """Pads an image's objects to a fixed number of targets: the last transform of detection.

  Reads `image`, `boxes_xyxy` and the other keys of objects; writes `boxes_cxcywh` float32 [num 4]
  relative to the image; `labels` int32, `is_target`, `is_crowd` bool and `area` float32 [num];
  `masks` bool [num h w] if there are masks; `image_size` int32 [2]. Padding is 0.
  """

  num: int | None = None  # default: the largest count in the data, or 100 where it is unknown

  def for_source(self, source: Source) -> Transform:
    largest = source.info.max_objects
    if self.num is None and largest is not None:
      return dataclasses.replace(self, num=max(1, largest))
    return self

  def __call__(self, example: Example, _: np.random.Generator) -> Example:
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
