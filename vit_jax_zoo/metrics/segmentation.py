"""Semantic segmentation: how well every pixel's class was found."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from vit_jax_zoo.metrics.base import Evaluator


class SegmentationEvaluator(Evaluator):
  """Counts pixels by true and found class: the confusion matrix of the whole split.

  Scores, fractions in [0, 1]: "miou", the mean over classes of intersection over union, TP / (TP +
  FP + FN) (Everingham et al., 2015, as Cityscapes and ADE20K have it): pixels of all images
  together, not an image's mean; "pixel_accuracy", the share of pixels that are right;
  "mean_accuracy", the mean over the classes that occur of their pixels' share that is right; with
  `per_class` also "iou/<class>"; "images". Pixels whose truth is `ignore_label` do not count at
  all. A class that neither occurs nor is ever found does not count; one that is found and never
  occurs has an IoU of 0.

  Args:
    num_classes: labels are 0 to num_classes - 1.
    ignore_label: of pixels that do not count.
    class_names: by label; the labels themselves by default.
    per_class: also scores each class.
  """

  def __init__(
    self,
    num_classes: int,
    *,
    ignore_label: int = 255,
    class_names: Sequence[str] = (),
    per_class: bool = False,
  ) -> None:
    self.num_classes = num_classes
    self.ignore_label = ignore_label
    self.class_names = tuple(class_names)
    self.per_class = per_class
    self.images = 0
    self.confusion = np.zeros((num_classes, num_classes), np.int64)

  def add(self, batch: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    """Takes one batch.

    Args:
      batch: `label_map` int [b h w], `ignore_label` where a pixel does not count; `image_size`
        [b 2], height and width without padding, and `mask` [b], both optional.
      predictions: `label_map` int [b h w], of the same pixels.

    Raises:
      ValueError: maps of different sizes, or a label that is no class.
    """
    truths, found = np.asarray(batch["label_map"]), np.asarray(predictions["label_map"])
    if truths.shape != found.shape:
      raise ValueError(f"true label maps are {truths.shape}, predicted ones {found.shape}")
    real = np.asarray(batch.get("mask", np.ones(len(truths))), bool)
    sizes = np.asarray(batch.get("image_size", [truths.shape[1:]] * len(truths)))
    for row in np.flatnonzero(real):
      height, width = sizes[row]
      self.confusion += self._count(truths[row, :height, :width], found[row, :height, :width])
      self.images += 1

  def _merge(self, other: Any) -> None:
    self.confusion += other.confusion
    self.images += other.images

  def result(self) -> dict[str, float]:
    """Returns the scores by name."""
    total = self.confusion.sum()
    if not total:
      raise ValueError(
        f"no pixel with a label was there in {self.images} images; is the split empty, or "
        f"does everything in it have the label {self.ignore_label}?"
      )
    right = np.diagonal(self.confusion)
    true, found = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
    union = true + found - right
    iou = right / np.maximum(union, 1)
    occurs = true > 0
    scores = {
      "miou": float(iou[union > 0].mean()),
      "pixel_accuracy": float(right.sum() / total),
      "mean_accuracy": float((right[occurs] / true[occurs]).mean()),
      "images": float(self.images),
    }
    if self.per_class:
      scores |= {f"iou/{self._name(i)}": float(iou[i]) for i in np.flatnonzero(union > 0).tolist()}
    return scores

  def _count(
    self, truth: Integer[np.ndarray, "h w"], found: Integer[np.ndarray, "h w"]
  ) -> Int[np.ndarray, "k k"]:
    counts = truth != self.ignore_label
    truth, found = truth[counts].astype(np.int64), found[counts].astype(np.int64)
    for labels, what in ((truth, "true"), (found, "predicted")):
      if labels.size and not 0 <= labels.min() <= labels.max() < self.num_classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise ValueError(
          f"the {what} label {wrong} is not one of 0..{self.num_classes - 1}, nor "
          f"{self.ignore_label} for pixels that do not count; check num_classes, and "
          "load_label_map's offset and ignore"
        )
    pairs = np.bincount(self.num_classes * truth + found, minlength=self.confusion.size)
    return pairs.reshape(self.confusion.shape)

  def _name(self, label: int) -> str:
    return self.class_names[label] if label < len(self.class_names) else str(label)
