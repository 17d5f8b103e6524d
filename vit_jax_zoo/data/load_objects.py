"""The first and the last transform of object detection: checked arrays, then padded targets."""

import dataclasses

import numpy as np
from absl import logging
from faster_coco_eval.core import mask as run_lengths

from vit_jax_zoo.data.base import CorruptExampleError, Example
from vit_jax_zoo.data.geometry import Size, clip, has_area, keep_objects
from vit_jax_zoo.data.objects import decode_outlines, decode_segments, encode_outline
from vit_jax_zoo.data.transform_base import Transform, pixels

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
