"""Mean intersection over union and accuracies of semantic segmentation."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax_zoo.errors import name_of
from vit_jax_zoo.metrics.base import Evaluator, check_labels, real_rows


@dataclasses.dataclass(eq=False)
class SegmentationEvaluator(Evaluator):
  """Scores from the confusion matrix of all pixels of a split.

  Scores, in [0, 1]: "miou", the mean over classes of TP / (TP + FP + FN) (Everingham et al., 2015;
  Cityscapes and ADE20K); "pixel_accuracy"; "mean_accuracy", over classes that occur; with
  `per_class` also "iou/<class>"; "images". Classes that neither occur nor are predicted do not
  count; predicted ones that do not occur have IoU 0.
  """

  scores = ("miou", "pixel_accuracy", "mean_accuracy", "images", "iou")

  num_classes: int
  ignore_label: int = 255
  class_names: Sequence[str] = ()  # by label; default: the labels
  per_class: bool = False
  images: int = dataclasses.field(default=0, init=False)

  def __post_init__(self) -> None:
    self.confusion = np.zeros((self.num_classes, self.num_classes), np.int64)

  def add(self, batch: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    """Adds one batch; ValueError for maps of different sizes, or an unknown label.

    `batch` and `predictions` have `label_map` int [b h w]; `batch` optional `image_size` [b 2],
    height and width without padding, and `mask` [b].
    """
    truths, found = np.asarray(batch["label_map"]), np.asarray(predictions["label_map"])
    if truths.shape != found.shape:
      raise ValueError(f"label_map: {truths.shape} in the batch, {found.shape} predicted")
    sizes = np.asarray(batch.get("image_size", [truths.shape[1:]] * len(truths)))
    advice = (
      f"0 to {self.num_classes - 1}, or {self.ignore_label} for ignored pixels. Check num_classes, "
      "and offset and ignore of load_label_map"
    )
    for row in real_rows(batch, len(truths)):
      height, width = sizes[row]
      counts = truths[row, :height, :width] != self.ignore_label
      true, predicted = (x[row, :height, :width][counts].astype(np.int64) for x in (truths, found))
      check_labels("label_map: true label", true, self.num_classes, advice)
      check_labels("label_map: predicted label", predicted, self.num_classes, advice)
      pairs = np.bincount(self.num_classes * true + predicted, minlength=self.confusion.size)
      self.confusion += pairs.reshape(self.confusion.shape)
      self.images += 1

  def _merge(self, other: Any) -> None:
    self.confusion += other.confusion
    self.images += other.images

  def result(self) -> dict[str, float]:
    total = self.confusion.sum()
    if not total:
      problem = f"label_map: no labelled pixel in {self.images} images"
      raise ValueError(f"{problem}; all are {self.ignore_label}, the ignored label")
    right = np.diagonal(self.confusion)
    true = self.confusion.sum(axis=1)
    union = true + self.confusion.sum(axis=0) - right
    iou = right / np.maximum(union, 1)
    scores = {
      "miou": float(iou[union > 0].mean()),
      "pixel_accuracy": float(right.sum() / total),
      "mean_accuracy": float((right[true > 0] / true[true > 0]).mean()),
      "images": float(self.images),
    }
    if self.per_class:
      for label in np.flatnonzero(union > 0):
        scores[f"iou/{name_of(label, self.class_names)}"] = float(iou[label])
    return scores
