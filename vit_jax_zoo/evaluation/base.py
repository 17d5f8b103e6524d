"""What every evaluator is: counts on the host that can be fed, merged and read."""

import abc
from collections.abc import Mapping

import numpy as np


class Evaluator(abc.ABC):
  """Scores predictions on the host. Each host feeds its own examples; the loop merges the hosts.

  It must be picklable: that is how it travels from host to host.
  """

  @abc.abstractmethod
  def add(self, batch: Mapping[str, np.ndarray], predictions: Mapping[str, np.ndarray]) -> None:
    """Takes one batch, padding included: rows whose `batch["mask"]` is False must not count."""

  @abc.abstractmethod
  def merge(self, other: "Evaluator") -> None:
    """Takes over all that another host's evaluator has been fed."""

  @abc.abstractmethod
  def result(self) -> dict[str, float]:
    """Returns the scores by name, over all examples."""
