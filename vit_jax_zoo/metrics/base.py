"""Evaluators: accumulate batches on the host, merge over hosts, return scores."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np


class Evaluator(abc.ABC):
  """Scores predictions on the host. Each host adds its own examples; the loop merges the hosts.

  Evaluators are pickled to be sent between hosts.

  Attributes:
    scores: names that `result` may return, without the "/<class>" of scores by class.
  """

  scores: ClassVar[tuple[str, ...]] = ()

  @abc.abstractmethod
  def add(self, batch: Mapping[str, np.ndarray], predictions: Mapping[str, np.ndarray]) -> None:
    """Adds one batch; rows whose `batch["mask"]` is False are padding and do not count."""

  def merge(self, other: "Evaluator") -> None:
    """Adds all examples of another host's evaluator.

    Raises:
      TypeError: it is of another class.
    """
    if not isinstance(other, type(self)):
      raise TypeError(f"cannot merge a {type(other).__name__} into a {type(self).__name__}")
    self._merge(other)

  @abc.abstractmethod
  def _merge(self, other: Any) -> None:
    """Implements `merge`; `other` is of the same class."""

  @abc.abstractmethod
  def result(self) -> dict[str, float]:
    """Returns the scores by name, over all examples."""


class MeanEvaluator(Evaluator):
  """Averages values by name over images with equal weight."""

  def __init__(self) -> None:
    self.images = 0
    self.sums: dict[str, float] = {}

  def count(self, images: int, sums: Mapping[str, float]) -> None:
    """Adds sums over a number of images."""
    self.images += images
    for name, total in sums.items():
      self.sums[name] = self.sums.get(name, 0.0) + total

  def means(self) -> dict[str, float]:
    """Returns the averages by name.

    Raises:
      ValueError: no image was added.
    """
    if not self.images:
      raise ValueError("no image was evaluated; is the evaluation split empty?")
    return {name: total / self.images for name, total in self.sums.items()}

  def _merge(self, other: Any) -> None:
    self.count(other.images, other.sums)
