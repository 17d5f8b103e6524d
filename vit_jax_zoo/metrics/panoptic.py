"""Panoptic segmentation: segments from mask predictions, and panoptic quality.

Segments as in DETR's code (arXiv:2005.12872, section 4.4). Panoptic quality: Kirillov et al.,
arXiv:1801.00868, section 4, with COCO's rules for crowds and unlabelled pixels.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from vit_jax_zoo.metrics.base import real_rows
from vit_jax_zoo.metrics.detection import original_size
from vit_jax_zoo.metrics.mask_ap import InstanceEvaluator

VOID = -1
SCORE_THRESHOLD = 0.85  # section 4.4
SMALLEST_AREA = 5  # pixels; smaller segments are dropped


@dataclasses.dataclass(frozen=True)
class Segmentation:
  """The segments of an image.

  Attributes:
    segment_map: index of the segment at every pixel; `VOID` for none.
    labels: class id of every segment; a segment may have no pixels.
    is_crowd: True for segments of several objects annotated as one; ground truth only.
  """

  segment_map: Int[np.ndarray, "h w"]
  labels: Int[np.ndarray, " s"]
  is_crowd: Bool[np.ndarray, " s"]

  @classmethod
  def of(
    cls,
    segment_map: Int[np.ndarray, "h w"],
    labels: Int[np.ndarray, " s"],
    is_crowd: Bool[np.ndarray, " s"] | None = None,
  ) -> "Segmentation":
    """Returns a segmentation, by default without crowds."""
    crowd = np.zeros(len(labels), bool) if is_crowd is None else is_crowd
    return cls(segment_map, labels, crowd)


def segment(
  mask_logits: Float[np.ndarray, "q i j"],
  labels: Int[np.ndarray, " q"],
  stuff_from: int,
  *,
  padded_size: tuple[int, int],
  image_size: tuple[int, int],
  size: tuple[int, int],
) -> Segmentation:
  """Assigns every pixel to the query with the largest mask logit.

  Stuff of one class becomes one segment. Segments of less than five pixels are dropped and their
  pixels reassigned, until all are larger. The padding is cropped, where the official code resizes
  masks with their padding; without padding the two are equal.

  Args:
    mask_logits: of the queries with an object, for the padded image.
    labels: class ids of these queries.
    stuff_from: first class id of stuff.
    padded_size: height and width of the padded image.
    image_size: height and width without padding.
    size: height and width of the result, the original image's.
  """
  if not len(labels):
    return Segmentation.of(np.full(size, VOID), labels)
  enlarge = functools.partial(cv2.resize, dsize=padded_size[::-1], interpolation=cv2.INTER_LINEAR)
  masks = np.stack([enlarge(np.asarray(mask, np.float32)) for mask in mask_logits])
  masks = masks[:, : image_size[0], : image_size[1]]
  winner = _merge_stuff(np.argmax(masks, axis=0), labels, stuff_from)
  while True:
    coarse = Image.fromarray(winner.astype(np.int32))
    segment_map = np.asarray(coarse.resize(size[::-1], Image.Resampling.NEAREST)).astype(np.int64)
    areas = np.bincount(segment_map.ravel(), minlength=len(labels))
    large = areas >= SMALLEST_AREA
    if large.all():
      return Segmentation.of(segment_map, labels)
    if not large.any():
      return Segmentation.of(np.full(size, VOID), labels[large])
    masks, labels = masks[large], labels[large]
    winner = np.argmax(masks, axis=0)


def _merge_stuff(
  winner: Int[np.ndarray, "h w"], labels: Int[np.ndarray, " q"], stuff_from: int
) -> Int[np.ndarray, "h w"]:
  """Assigns all regions of a stuff class to the first query of this class."""
  owner = np.arange(len(labels))
  for label in np.unique(labels[labels >= stuff_from]):
    same = np.flatnonzero(labels == label)
    owner[same] = same[0]
  return owner[winner]


def true_segments(batch: Mapping[str, Any], row: int) -> Segmentation:
  """Returns an image's true segments, in its original pixels; see `PanopticEvaluator.add`."""
  height, width = original_size(batch, row)
  return Segmentation.of(
    np.asarray(batch["segment_map"][row])[:height, :width].astype(np.int64),
    np.asarray(batch["labels"][row]).astype(np.int64),
    np.asarray(batch["is_crowd"][row], bool) if "is_crowd" in batch else None,
  )


def found_segments(
  batch: Mapping[str, Any],
  predictions: Mapping[str, Any],
  row: int,
  stuff_from: int,
  *,
  threshold: float = SCORE_THRESHOLD,
) -> Segmentation:
  """Returns an image's predicted segments, in its original pixels.

  Args:
    batch: see `PanopticEvaluator.add`; so are `predictions`.
    predictions: of all images.
    row: index of the image in the batch.
    stuff_from: first class id of stuff.
    threshold: minimum score of the queries.
  """
  padded = batch["image"].shape[1:3]
  shown = np.asarray(batch["image_size"][row]) if "image_size" in batch else padded
  kept = np.asarray(predictions["is_object"][row], bool)
  kept = kept & (np.asarray(predictions["scores"][row]) > threshold)
  return segment(
    np.asarray(predictions["mask_logits"][row], np.float32)[kept],
    np.asarray(predictions["labels"][row])[kept].astype(np.int64),
    stuff_from,
    padded_size=(int(padded[0]), int(padded[1])),
    image_size=(int(shown[0]), int(shown[1])),
    size=original_size(batch, row),
  )


class PanopticQuality:
  """True positives, false negatives and false positives of every class.

  Segments of one class match if their IoU is above 0.5. PQ = sum of matched IoU / (matches + half
  the misses and false alarms) = SQ x RQ.

  Args:
    num_classes: highest class id + 1.
    stuff_from: first class id of stuff.
  """

  def __init__(self, num_classes: int, stuff_from: int) -> None:
    self.stuff_from = stuff_from
    self.iou = np.zeros(num_classes)
    self.matches, self.misses, self.false_alarms = np.zeros((3, num_classes), np.int64)

  def add(self, truth: Segmentation, found: Segmentation) -> None:
    """Counts one image.

    Unlabelled pixels do not count in a predicted segment's area. A segment mostly on unlabelled
    pixels, or in a crowd of its class, is no false alarm. Crowds cannot be missed.
    """
    shared = _shared_pixels(truth, found)
    truth_area, found_area = shared.sum(axis=1), shared.sum(axis=0)
    void = shared[-1]  # last row and column: pixels without a segment
    union = truth_area[:-1, None] + (found_area - void)[None, :-1] - shared[:-1, :-1]
    iou = shared[:-1, :-1] / np.maximum(union, 1)
    alike = (truth.labels[:, None] == found.labels[None]) & ~truth.is_crowd[:, None]
    rows, columns = np.nonzero(alike & (iou > 0.5))
    np.add.at(self.matches, truth.labels[rows], 1)
    np.add.at(self.iou, truth.labels[rows], iou[rows, columns])

    missed = ~truth.is_crowd & (truth_area[:-1] > 0)
    missed[rows] = False
    np.add.at(self.misses, truth.labels[missed], 1)
    crowd = truth.is_crowd[:, None] & (truth.labels[:, None] == found.labels[None])
    excused = void[:-1] + (shared[:-1, :-1] * crowd).sum(axis=0)
    false = (found_area[:-1] > 0) & (excused <= 0.5 * found_area[:-1])
    false[columns] = False
    np.add.at(self.false_alarms, found.labels[false], 1)

  def merge(self, other: "PanopticQuality") -> None:
    """Adds another's counts."""
    self.iou += other.iou
    self.matches += other.matches
    self.misses += other.misses
    self.false_alarms += other.false_alarms

  def result(self) -> dict[str, float]:
    """Returns "pq", "sq", "rq", means over the classes that occur, of all, "_things" and "_stuff".

    Means without any class are omitted.
    """
    stuff = np.arange(len(self.iou)) >= self.stuff_from
    weight, found = self.matches + 0.5 * (self.misses + self.false_alarms), {}
    for suffix, classes in (("", stuff | True), ("_things", ~stuff), ("_stuff", stuff)):
      occurs = classes & (weight > 0)
      if occurs.any():
        iou, matches, total = self.iou[occurs], self.matches[occurs], weight[occurs]
        scores = {"pq": iou / total, "sq": iou / np.maximum(matches, 1), "rq": matches / total}
        found |= {name + suffix: float(values.mean()) for name, values in scores.items()}
    return found


def _shared_pixels(truth: Segmentation, found: Segmentation) -> Int[np.ndarray, "s t"]:
  """Returns the number of shared pixels of each pair; the last row and column are void."""
  shape = len(truth.labels) + 1, len(found.labels) + 1
  rows = np.where(truth.segment_map == VOID, shape[0] - 1, truth.segment_map)
  columns = np.where(found.segment_map == VOID, shape[1] - 1, found.segment_map)
  pairs = (rows * shape[1] + columns).ravel()
  return np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)


class PanopticEvaluator(InstanceEvaluator):
  """COCO's metrics of boxes and of masks of things, and panoptic quality.

  Args:
    num_classes: highest class id + 1.
    stuff_from: first class id of stuff; 91 in COCO.
    score_threshold: minimum score of the queries that become segments.
    class_names: names by class id.
    per_class: also evaluates each class's boxes.
  """

  scores = (
    *(f"{name}{kind}" for kind in ("", "_things", "_stuff") for name in ("pq", "sq", "rq")),
    *InstanceEvaluator.scores,
  )

  def __init__(
    self,
    num_classes: int,
    stuff_from: int,
    *,
    score_threshold: float = SCORE_THRESHOLD,
    class_names: Sequence[str] = (),
    per_class: bool = False,
  ) -> None:
    super().__init__(
      num_classes, class_names=class_names, per_class=per_class, masks_below=stuff_from
    )
    self.score_threshold = score_threshold
    self.quality = PanopticQuality(num_classes, stuff_from)
    self.seen: set[int] = set()

  def add(self, batch: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    """Evaluates one batch.

    Args:
      batch: as `DetectionEvaluator.add`, and `segment_map` int [b h w]: index of the target at each
        pixel of the original image, padded at the right and bottom, `VOID` for none.
      predictions: also `is_object` [b q] and `mask_logits` [b q i j].
    """
    super().add(batch, predictions)
    stuff_from, threshold = self.quality.stuff_from, self.score_threshold
    for row in real_rows(batch, len(batch["image"])).tolist():
      if "image_id" in batch:
        number = int(batch["image_id"][row])
        if number in self.seen:
          continue
        self.seen.add(number)
      found = found_segments(batch, predictions, row, stuff_from, threshold=threshold)
      self.quality.add(true_segments(batch, row), found)

  def _merge(self, other: Any) -> None:
    super()._merge(other)
    self.quality.merge(other.quality)  # hosts evaluate disjoint images

  def result(self) -> dict[str, float]:
    """Returns the metrics of boxes, of masks, and of `PanopticQuality`."""
    return super().result() | self.quality.result()
