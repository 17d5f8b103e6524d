"""Classification metrics as mergeable counts: top-1, top-k, per class, multi-label, loss."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped

from vit_jax_zoo.metrics.base import Evaluator


class ClassificationEvaluator(Evaluator):
  """Counts what the predictions got right.

  An image may carry several labels (ImageNet-ReaL, arXiv:2006.07159; JFT): its best prediction is
  right when it is any of them, and an image without any label is left out of numerator and
  denominator, of the loss too.

  Scores: "accuracy", "top5_accuracy" (as many as the predictions hold, when that is fewer than the
  classes), "loss" (mean over images), "images" (how many counted); with `per_class` also
  "accuracy/<class>" (the share of the class's images that were recognised) and
  "mean_class_accuracy" (their mean over the classes that occur, as Pets, Flowers and Caltech-101
  are scored). Counts are integers and merge exactly; the loss is summed in float64.

  Args:
    num_classes: size of the label set.
    per_class: also scores each class, and keeps the confusion matrix.
    class_names: names of the classes in order; their numbers by default.
  """

  scores = ("accuracy", "top5_accuracy", "loss", "images", "mean_class_accuracy")

  def __init__(
    self, num_classes: int, *, per_class: bool = False, class_names: Sequence[str] = ()
  ) -> None:
    self.num_classes = num_classes
    self.per_class = per_class
    self.class_names = tuple(class_names) or tuple(str(i) for i in range(num_classes))
    self.images = 0
    self.loss = 0.0
    self.hits: collections.Counter[int] = collections.Counter()  # rank -> right at that rank
    self.ranks = 0
    self.pairs: collections.Counter[tuple[int, int]] = collections.Counter()

  def add(self, batch: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    """Counts one batch.

    Args:
      batch: `label`, int [b] or multi-hot [b k]; `mask` [b], True for real rows, optional.
      predictions: as `tasks.classification.Classification.predict` returns them: `labels` [b r],
        best first, and `loss` [b].

    Raises:
      ValueError: when a real row's label is not one of the classes.
    """
    labels = np.asarray(batch["label"])
    kept = np.asarray(batch.get("mask", np.ones(len(labels))), bool)
    self._check(labels[kept])
    if labels.ndim == 2:
      kept = kept & (labels.max(axis=1) > 0)
    labels, ranked = labels[kept], np.asarray(predictions["labels"])[kept]
    self.images += len(labels)
    self.loss += float(np.sum(np.asarray(predictions["loss"], np.float64)[kept]))
    self.ranks = ranked.shape[1]
    hits = is_correct(labels, ranked)
    first = np.where(hits.any(axis=1), hits.argmax(axis=1), self.ranks)
    self.hits.update(first[first < self.ranks].tolist())
    if self.per_class:
      self.pairs.update(_label_prediction_pairs(labels, ranked[:, 0]))

  def _merge(self, other: Any) -> None:
    self.images += other.images
    self.loss += other.loss
    self.ranks = max(self.ranks, other.ranks)
    self.hits.update(other.hits)
    self.pairs.update(other.pairs)

  def result(self) -> dict[str, float]:
    """Returns the scores by name; accuracies are fractions in [0, 1]."""
    if not self.images:
      raise ValueError("no image with a label was evaluated; is the evaluation split empty?")
    scores = {"accuracy": self.hits[0] / self.images}
    if 1 < self.ranks < self.num_classes:
      scores[f"top{self.ranks}_accuracy"] = sum(self.hits.values()) / self.images
    scores |= {"loss": self.loss / self.images, "images": float(self.images)}
    return scores | (self._class_scores() if self.per_class else {})

  def confusion(self) -> Int[np.ndarray, "k k"]:
    """Returns how often class i (row) was taken for class j (column); needs `per_class`.

    An image with several labels counts in the row of each of them.
    """
    matrix = np.zeros((self.num_classes, self.num_classes), np.int64)
    for (label, prediction), count in self.pairs.items():
      matrix[label, prediction] = count
    return matrix

  def _class_scores(self) -> dict[str, float]:
    seen: collections.Counter[int] = collections.Counter()
    for (label, _), count in self.pairs.items():
      seen[label] += count
    shares = {label: self.pairs[label, label] / seen[label] for label in sorted(seen)}
    scores = {f"accuracy/{self.class_names[label]}": share for label, share in shares.items()}
    return {"mean_class_accuracy": sum(shares.values()) / len(shares)} | scores

  def _check(self, labels: Shaped[np.ndarray, "..."]) -> None:
    if labels.ndim == 2:
      if labels.shape[1] != self.num_classes:
        raise ValueError(
          f"label: {labels.shape[1]} columns; expected num_classes={self.num_classes}"
        )
    elif labels.size and not 0 <= labels.min() <= labels.max() < self.num_classes:
      wrong = labels.min() if labels.min() < 0 else labels.max()
      raise ValueError(
        f"label: {wrong}; expected 0 to {self.num_classes - 1}. Set num_classes to the dataset's"
      )


def is_correct(
  labels: Shaped[np.ndarray, "b ..."], predictions: Int[np.ndarray, "b r"]
) -> Bool[np.ndarray, "b r"]:
  """Tells which predictions are right.

  Args:
    labels: class indices [b], or label weights [b k]: any class that has the largest weight of its
      row is right, so that this serves multi-hot labels and mixed ones alike.
    predictions: class indices.
  """
  if labels.ndim == 1:
    return labels[:, None] == predictions
  weights = np.take_along_axis(labels, predictions, axis=1)
  return (weights > 0) & (weights == labels.max(axis=1, keepdims=True))


def _label_prediction_pairs(
  labels: Shaped[np.ndarray, "b ..."], predictions: Int[np.ndarray, " b"]
) -> list[tuple[int, int]]:
  if labels.ndim == 1:
    return list(zip(labels.tolist(), predictions.tolist(), strict=True))
  rows, classes = np.nonzero(labels > 0)
  return list(zip(classes.tolist(), predictions[rows].tolist(), strict=True))
