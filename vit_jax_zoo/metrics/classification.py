"""Classification metrics as mergeable counts: top-1, top-k, per class, multi-label, loss."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from vit_jax_zoo.errors import name_of
from vit_jax_zoo.metrics.base import Evaluator, check_labels, real_rows


@dataclasses.dataclass(eq=False)
class ClassificationEvaluator(Evaluator):
  """Counts correct predictions.

  An image may have several labels (ImageNet-ReaL, arXiv:2006.07159; JFT), any of which is correct;
  images without a label do not count. Scores: "accuracy", "top5_accuracy" (or as many as the
  predictions have, if fewer than the classes), "loss" (mean over images), "images"; with
  `per_class` also "accuracy/<class>" and "mean_class_accuracy" (over the classes that occur, as for
  Pets, Flowers and Caltech-101).
  """

  scores = ("accuracy", "top5_accuracy", "loss", "images", "mean_class_accuracy")

  num_classes: int
  per_class: bool = False
  class_names: Sequence[str] = ()  # default: their numbers

  def __post_init__(self) -> None:
    self.images, self.loss, self.ranks = 0, 0.0, 0
    self.hits: collections.Counter[int] = collections.Counter()  # rank -> correct at that rank
    self.pairs: collections.Counter[tuple[int, int]] = collections.Counter()

  def add(self, batch: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    """Adds one batch; ValueError if a label is not one of the classes.

    `batch`: `label`, int [b] or multi-hot [b k], optional `mask` [b]. `predictions`: `labels` [b
    r], best first, `correct` [b r], `loss` [b].
    """
    labels = np.asarray(batch["label"])
    kept = real_rows(batch, len(labels))
    if labels.ndim == 2:
      if (k := labels.shape[1]) != self.num_classes:
        raise ValueError(f"label: {k} columns; expected num_classes={self.num_classes}")
      kept = kept[labels[kept].max(axis=1) > 0]
    else:
      advice = f"0 to {self.num_classes - 1}. Set num_classes to the dataset's"
      check_labels("label:", labels[kept], self.num_classes, advice)
    labels, ranked = labels[kept], np.asarray(predictions["labels"])[kept]
    self.images += len(labels)
    self.loss += float(np.sum(np.asarray(predictions["loss"], np.float64)[kept]))
    self.ranks = ranked.shape[1]
    hits = np.asarray(predictions["correct"])[kept]
    self.hits.update(hits.argmax(axis=1)[hits.any(axis=1)].tolist())
    if self.per_class:
      all_rows = np.arange(len(labels))
      rows, classes = (all_rows, labels) if labels.ndim == 1 else np.nonzero(labels > 0)
      self.pairs.update(zip(classes.tolist(), ranked[rows, 0].tolist(), strict=True))

  def merge(self, other: Any) -> None:
    self.images += other.images
    self.loss += other.loss
    self.ranks = max(self.ranks, other.ranks)
    self.hits.update(other.hits)
    self.pairs.update(other.pairs)

  def result(self) -> dict[str, float]:
    if not self.images:
      raise ValueError("label: no labelled image in the evaluation; expected at least one")
    scores = {"accuracy": self.hits[0] / self.images}
    if 1 < self.ranks < self.num_classes:
      scores[f"top{self.ranks}_accuracy"] = sum(self.hits.values()) / self.images
    scores |= {"loss": self.loss / self.images, "images": float(self.images)}
    return scores | (self._class_scores() if self.per_class else {})

  def confusion(self) -> Int[np.ndarray, "k k"]:
    matrix = np.zeros((self.num_classes, self.num_classes), np.int64)
    for pair, count in self.pairs.items():
      matrix[pair] = count
    return matrix

  def _class_scores(self) -> dict[str, float]:
    totals: collections.Counter[int] = collections.Counter()
    for (label, _), count in self.pairs.items():
      totals[label] += count
    accuracies = {label: self.pairs[label, label] / totals[label] for label in sorted(totals)}
    scores = {f"accuracy/{name_of(i, self.class_names)}": value for i, value in accuracies.items()}
    return {"mean_class_accuracy": sum(accuracies.values()) / len(accuracies)} | scores


def score_rankings(
  ranked: Int[np.ndarray, "n r"], labels: Bool[np.ndarray, "n k"], *, only_its_classes: bool = False
) -> dict[str, float]:
  """Returns "accuracy", "top5_accuracy" (of more than five classes), "images", "classes".

  For ReaL (arXiv:2006.07159), and ImageNet-A and -R (arXiv:1907.07174, 2006.16241) of 200 classes.
  The last two count images with a label, and classes that occur; with `only_its_classes`, others
  are ignored in `ranked`, which then has all classes, the most probable first.
  """
  labelled = labels.any(axis=1)
  if not labelled.any():
    raise ValueError(f"label: none in {len(labels)} images; expected at least one")
  ranked, labels = ranked[labelled], labels[labelled]
  occurring = np.asarray(labels.any(axis=0))
  if only_its_classes:
    last = np.argsort(np.logical_not(occurring[ranked]), axis=1, kind="stable")
    ranked = np.take_along_axis(ranked, last, axis=1)[:, : occurring.sum()]
  right = np.take_along_axis(labels, ranked[:, :5], axis=1)
  scores = {"accuracy": float(right[:, 0].mean())}
  if (occurring.sum() if only_its_classes else labels.shape[1]) > 5:
    scores["top5_accuracy"] = float(right.any(axis=1).mean())
  return scores | {"images": float(len(ranked)), "classes": float(occurring.sum())}
