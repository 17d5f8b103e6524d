"""Evaluators: accumulate batches on the host, merge over hosts, return scores."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import numpy as np
from jaxtyping import Int

Arrays: TypeAlias = Mapping[str, Any]  # of a batch or of its predictions
Size: TypeAlias = tuple[int, int]  # height and width in pixels


class Evaluator(abc.ABC):
  """Scores predictions on the host: each adds its examples; the loop pickles and merges them."""

  scores: ClassVar[tuple[str, ...]] = ()  # of `result`, without the "/<class>" of classes

  @abc.abstractmethod
  def add(self, batch: Mapping[str, np.ndarray], predictions: Mapping[str, np.ndarray]) -> None:
    """Adds one batch; rows whose `batch["mask"]` is False are padding and do not count."""

  @abc.abstractmethod
  def merge(self, other: Any) -> None:
    """Adds all examples of another host's evaluator, of the same class."""

  @abc.abstractmethod
  def result(self) -> dict[str, float]:
    """Returns the scores by name, over all examples; ValueError if there are none."""


def real_rows(batch: Mapping[str, Any], count: int) -> Int[np.ndarray, " r"]:
  """Returns the indices, among `count` rows, of those that are not padding."""
  return np.flatnonzero(np.asarray(batch.get("mask", np.ones(count)), bool))


def check_labels(field: str, labels: np.ndarray, num_classes: int, advice: str) -> None:
  """Raises ValueError, with the advice, unless all labels are in [0, num_classes)."""
  if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
    wrong = labels.min() if labels.min() < 0 else labels.max()
    raise ValueError(f"{field} {wrong}; expected {advice}")
