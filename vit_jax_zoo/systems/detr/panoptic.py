"""Masks and panoptic segments from mask predictions, their scores, and panoptic quality.

DETR, arXiv:2005.12872, section 4.4; Kirillov et al., arXiv:1801.00868, section 4, with COCO rules.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Int
from PIL import Image

from vit_jax_zoo.metrics.base import Arrays, Size, real_rows
from vit_jax_zoo.metrics.detection import InstanceEvaluator, encode_masks, original_size
from vit_jax_zoo.ops.resize import nearest_indices

VOID = -1
SCORE_THRESHOLD = 0.85  # section 4.4
SMALLEST_AREA = 5  # pixels; smaller segments are dropped


@dataclasses.dataclass(frozen=True)
class Segmentation:
  """The segments of an image."""

  segment_map: Int[np.ndarray, "h w"]  # index of the segment at every pixel; `VOID` for none
  labels: Int[np.ndarray, " s"]  # class ids; a segment may have no pixels
  is_crowd: Bool[np.ndarray, " s"] | None = None  # annotated groups of objects; None: no crowds


def original_masks(
  batch: Arrays, predictions: Arrays, row: int, size: Size
) -> Iterator[Bool[np.ndarray, "h w"]]:
  """Yields each query's mask in the original image's pixels, resized as in the official code.

  Bilinear to the padded image, thresholded at one half, cropped, then nearest neighbour with the
  index rounded down. `mask_logits` is [b q i j], `row` the example, `size` the original image's.
  """
  padded = batch["image"].shape[1:3]
  inner = batch["image_size"][row] if "image_size" in batch else padded
  rows, columns = (nearest_indices(int(n), new) for n, new in zip(inner, size, strict=True))
  for logits in np.asarray(predictions["mask_logits"][row], np.float32):
    large = cv2.resize(logits, (padded[1], padded[0]), interpolation=cv2.INTER_LINEAR)
    yield (large > 0)[rows][:, columns]


def found_segments(
  batch: Arrays, predictions: Arrays, row: int, stuff_from: int, threshold: float
) -> Segmentation:
  """Returns an image's predicted segments, of queries above the threshold, in original pixels.

  Every pixel belongs to the query with the largest mask logit. Stuff of one class becomes one
  segment. Segments of less than five pixels are dropped and their pixels reassigned, until all are
  larger. The padding is cropped, where the official code resizes masks with their padding; without
  padding the two are equal.
  """
  size, padded = original_size(batch, row), batch["image"].shape[1:3]
  height, width = batch["image_size"][row] if "image_size" in batch else padded
  is_sure = np.asarray(predictions["scores"][row]) > threshold
  selected = np.asarray(predictions["is_object"][row], bool) & is_sure
  labels = np.asarray(predictions["labels"][row])[selected].astype(np.int64)
  if not len(labels):
    return Segmentation(np.full(size, VOID), labels)
  logits = np.asarray(predictions["mask_logits"][row], np.float32)[selected]
  enlarge = functools.partial(cv2.resize, dsize=padded[::-1], interpolation=cv2.INTER_LINEAR)
  masks = np.stack([enlarge(mask) for mask in logits])[:, :height, :width]
  owner = np.arange(len(labels))  # of regions of stuff: the first query of the class
  for label in np.unique(labels[labels >= stuff_from]):
    owner[labels == label] = np.flatnonzero(labels == label)[0]
  winner = owner[np.argmax(masks, axis=0)]
  while True:
    coarse = Image.fromarray(winner.astype(np.int32))
    segment_map = np.asarray(coarse.resize(size[::-1], Image.Resampling.NEAREST)).astype(np.int64)
    large = np.bincount(segment_map.ravel(), minlength=len(labels)) >= SMALLEST_AREA
    if large.all():
      return Segmentation(segment_map, labels)
    if not large.any():
      return Segmentation(np.full(size, VOID), labels[large])
    masks, labels = masks[large], labels[large]
    winner = np.argmax(masks, axis=0)


def true_segments(batch: Arrays, row: int) -> Segmentation:
  """Returns an image's true segments, in its original pixels; see `PanopticEvaluator.add`."""
  height, width = original_size(batch, row)
  return Segmentation(
    np.asarray(batch["segment_map"][row])[:height, :width].astype(np.int64),
    np.asarray(batch["labels"][row]).astype(np.int64),
    np.asarray(batch["is_crowd"][row], bool) if "is_crowd" in batch else None,
  )


@dataclasses.dataclass(eq=False)
class QueryMaskEvaluator(InstanceEvaluator):
  """COCO's metrics of boxes and of queries' masks, `mask_logits` [b q i j] of the padded image."""

  def found_masks(self, batch: Arrays, predictions: Arrays, row: int, size: Size) -> list[Any]:
    masks = original_masks(batch, predictions, row, size)
    return [encode_masks(mask[None])[0] for mask in masks]


@dataclasses.dataclass(eq=False)
class PanopticEvaluator(QueryMaskEvaluator):
  """COCO's metrics of boxes and of masks of things, and panoptic quality.

  Of true positives, false negatives and false positives of every class, at an IoU above 0.5:
  PQ = sum of IoU of true positives / (TP + FP / 2 + FN / 2) = SQ x RQ.
  """

  scores = (
    *(f"{name}{kind}" for kind in ("", "_things", "_stuff") for name in ("pq", "sq", "rq")),
    *InstanceEvaluator.scores,
  )

  stuff_from: int = 91  # first class id of stuff; 91 in COCO
  score_threshold: float = SCORE_THRESHOLD  # minimum score of the queries that become segments
  image_ids: set[int] = dataclasses.field(default_factory=set, init=False)

  def __post_init__(self) -> None:
    self.iou = np.zeros(self.num_classes)
    counts = np.zeros((3, self.num_classes), np.int64)
    self.true_positives, self.false_negatives, self.false_positives = counts

  def _evaluate(self, kind: Any, class_ids: Sequence[int]) -> Any:
    return super()._evaluate(kind, range(self.stuff_from) if kind == "segm" else class_ids)

  def add(self, batch: Arrays, predictions: Arrays) -> None:
    """Evaluates one batch, as `InstanceEvaluator` describes it.

    `segment_map` int [b h w] is the target's index at each pixel, of the original image, or `VOID`.
    """
    super().add(batch, predictions)
    for row in real_rows(batch, len(batch["image"])).tolist():
      if "image_id" in batch:
        number = int(batch["image_id"][row])
        if number in self.image_ids:
          continue
        self.image_ids.add(number)
      found = found_segments(batch, predictions, row, self.stuff_from, self.score_threshold)
      self.count(true_segments(batch, row), found)

  def count(self, truth: Segmentation, found: Segmentation) -> None:
    """Counts one image.

    Unlabelled pixels do not count in a predicted segment's area. A segment mostly on unlabelled
    pixels, or in a crowd of its class, is no false positive; a crowd is no false negative.
    """
    # Shared pixels of each pair of segments; the last row and column are pixels without a segment.
    shape = len(truth.labels) + 1, len(found.labels) + 1
    rows = np.where(truth.segment_map == VOID, shape[0] - 1, truth.segment_map)
    columns = np.where(found.segment_map == VOID, shape[1] - 1, found.segment_map)
    pairs = (rows * shape[1] + columns).ravel()
    shared = np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)
    crowds = np.zeros(len(truth.labels), bool) if truth.is_crowd is None else truth.is_crowd
    truth_area, found_area = shared.sum(axis=1)[:-1], shared.sum(axis=0)[:-1]
    void, shared = shared[-1, :-1], shared[:-1, :-1]
    iou = shared / np.maximum(truth_area[:, None] + (found_area - void)[None] - shared, 1)
    same_class = truth.labels[:, None] == found.labels[None]
    rows, columns = np.nonzero(same_class & ~crowds[:, None] & (iou > 0.5))
    np.add.at(self.true_positives, truth.labels[rows], 1)
    np.add.at(self.iou, truth.labels[rows], iou[rows, columns])

    missed = ~crowds & (truth_area > 0)
    missed[rows] = False
    np.add.at(self.false_negatives, truth.labels[missed], 1)
    excused = void + (shared * (same_class & crowds[:, None])).sum(axis=0)
    false = (found_area > 0) & (excused <= 0.5 * found_area)
    false[columns] = False
    np.add.at(self.false_positives, found.labels[false], 1)

  def merge(self, other: Any) -> None:
    super().merge(other)
    for name in ("iou", "true_positives", "false_negatives", "false_positives"):
      setattr(self, name, getattr(self, name) + getattr(other, name))  # of disjoint images

  def result(self) -> dict[str, float]:
    return super().result() | self.panoptic_scores()

  def panoptic_scores(self) -> dict[str, float]:
    """Returns "pq", "sq", "rq", means over classes that occur: all, "_things" and "_stuff"."""
    stuff = np.arange(len(self.iou)) >= self.stuff_from
    errors, found = self.false_negatives + self.false_positives, {}
    weight = self.true_positives + 0.5 * errors
    for suffix, classes in (("", stuff | True), ("_things", ~stuff), ("_stuff", stuff)):
      occurs = classes & (weight > 0)
      if occurs.any():
        iou, matches, total = self.iou[occurs], self.true_positives[occurs], weight[occurs]
        scores = {"pq": iou / total, "sq": iou / np.maximum(matches, 1), "rq": matches / total}
        found |= {name + suffix: float(values.mean()) for name, values in scores.items()}
    return found
