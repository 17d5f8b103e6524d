"""Scores of a generative model of pixels: nats and bits a pixel, beside a bigram's."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax_zoo.metrics.base import MeanEvaluator

SUMMED = ("nats", "bigram_nats", "class_loss", "correct")
"""Predictions that are summed over images, where there are any."""


class PixelEvaluator(MeanEvaluator):
  """Averages over images, each of which weighs the same.

  Scores: "nats" and "bits" a pixel, "log_likelihood" (minus nats; higher is better), "images", and
  where the predictions have them "bigram_nats", the baseline's, "class_loss" and "accuracy".
  """

  scores = (
    "nats", "bits", "log_likelihood", "images", "bigram_nats", "class_loss", "accuracy",
  )  # fmt: skip

  def add(self, batch: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    """Takes one batch.

    Args:
      batch: `mask` [b], True for real rows, optional.
      predictions: as `tasks.pixel_modelling.PixelModelling.predict` returns them.
    """
    nats = np.asarray(predictions["nats"])
    kept = np.asarray(batch.get("mask", np.ones(len(nats))), bool)
    sums = {
      name: float(np.sum(np.asarray(predictions[name], np.float64)[kept]))
      for name in SUMMED
      if name in predictions
    }
    self.count(int(kept.sum()), sums)

  def result(self) -> dict[str, float]:
    """Returns the scores by name."""
    means = self.means()
    if "correct" in means:
      means["accuracy"] = means.pop("correct")
    nats = means["nats"]
    scores = {"bits": nats / math.log(2), "log_likelihood": -nats, "images": float(self.images)}
    return {**means, **scores}
