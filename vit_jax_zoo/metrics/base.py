"""What every evaluator is: counts on the host that can be fed, merged and read."""

import abc
from collections.abc import Mapping
from typing import Any

import numpy as np


class Evaluator(abc.ABC):
  """Scores predictions on the host. Each host feeds its own examples; the loop merges the hosts.

  It must be picklable: that is how it travels from host to host.
  """

  @abc.abstractmethod
  def add(self, batch: Mapping[str, np.ndarray], predictions: Mapping[str, np.ndarray]) -> None:
    """Takes one batch, padding included: rows whose `batch["mask"]` is False must not count."""

  def merge(self, other: "Evaluator") -> None:
    """Takes over all that another host's evaluator has been fed.

    Raises:
      TypeError: that one evaluates something else.
    """
    if not isinstance(other, type(self)):
      raise TypeError(f"cannot merge a {type(other).__name__} into a {type(self).__name__}")
    self._merge(other)

  @abc.abstractmethod
  def _merge(self, other: Any) -> None:
    """Does what `merge` says, of one of the same class."""

  @abc.abstractmethod
  def result(self) -> dict[str, float]:
    """Returns the scores by name, over all examples."""


class MeanEvaluator(Evaluator):
  """Averages numbers by name over images, each of which weighs the same."""

  def __init__(self) -> None:
    self.images = 0
    self.sums: dict[str, float] = {}

  def count(self, images: int, sums: Mapping[str, float]) -> None:
    """Takes what was summed over so many images."""
    self.images += images
    for name, total in sums.items():
      self.sums[name] = self.sums.get(name, 0.0) + total

  def means(self) -> dict[str, float]:
    """Returns the averages by name.

    Raises:
      ValueError: there was no image.
    """
    if not self.images:
      raise ValueError("no image was evaluated; is the evaluation split empty?")
    return {name: total / self.images for name, total in self.sums.items()}

  def _merge(self, other: Any) -> None:
    self.count(other.images, other.sums)
