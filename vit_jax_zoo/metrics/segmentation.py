"""Mean intersection over union and accuracies of semantic segmentation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from vit_jax_zoo.metrics.base import Evaluator


class SegmentationEvaluator(Evaluator):
  """Scores from the confusion matrix of all pixels of a split.

  Scores, in [0, 1]: "miou", the mean over classes of TP / (TP + FP + FN) over the pixels of all
  images (Everingham et al., 2015; Cityscapes and ADE20K); "pixel_accuracy"; "mean_accuracy", the
  mean over classes that occur of their pixel accuracy; with `per_class` also "iou/<class>";
  "images". Pixels with `ignore_label` do not count. Classes that neither occur nor are predicted do
  not count; predicted ones that do not occur have IoU 0.

  Args:
    num_classes: number of classes.
    ignore_label: label of ignored pixels.
    class_names: names by label; default: the labels.
    per_class: also returns each class's IoU.
  """

  scores = ("miou", "pixel_accuracy", "mean_accuracy", "images", "iou")

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
    """Adds one batch.

    Args:
      batch: `label_map` int [b h w]; optional `image_size` [b 2], height and width without padding,
        and `mask` [b].
      predictions: `label_map` int [b h w].

    Raises:
      ValueError: maps of different sizes, or an unknown label.
    """
    truths, found = np.asarray(batch["label_map"]), np.asarray(predictions["label_map"])
    if truths.shape != found.shape:
      raise ValueError(f"label_map: {truths.shape} in the batch, {found.shape} predicted")
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
        f"label_map: no labelled pixel in {self.images} images; the split is empty, or all its "
        f"labels are {self.ignore_label}, the ignored label"
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
          f"label_map: {what} label {wrong}; expected 0 to {self.num_classes - 1}, or "
          f"{self.ignore_label} for ignored pixels. Check num_classes, and offset and ignore of "
          "load_label_map"
        )
    pairs = np.bincount(self.num_classes * truth + found, minlength=self.confusion.size)
    return pairs.reshape(self.confusion.shape)

  def _name(self, label: int) -> str:
    return self.class_names[label] if label < len(self.class_names) else str(label)
