"""Scores of a generative model of pixels: nats and bits a pixel, beside a bigram's."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax_zoo.evaluation.base import Evaluator

SUMMED = ("nats", "bigram_nats", "class_loss", "correct")
"""Predictions that are summed over images, where there are any."""


class PixelEvaluator(Evaluator):
  """Averages over images, each of which weighs the same.

  Scores: "nats" and "bits" a pixel, "log_likelihood" (minus nats; higher is better), "images", and
  where the predictions have them "bigram_nats", the baseline's, "class_loss" and "accuracy".
  """

  def __init__(self) -> None:
    self.images = 0
    self.sums: dict[str, float] = {}

  def add(self, batch: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    """Takes one batch.

    Args:
      batch: `mask` [b], True for real rows, optional.
      predictions: as `tasks.pixel_modelling.PixelModelling.predict` returns them.
    """
    nats = np.asarray(predictions["nats"])
    kept = np.asarray(batch.get("mask", np.ones(len(nats))), bool)
    self.images += int(kept.sum())
    for name in SUMMED:
      if name in predictions:
        total = float(np.sum(np.asarray(predictions[name], np.float64)[kept]))
        self.sums[name] = self.sums.get(name, 0.0) + total

  def merge(self, other: Evaluator) -> None:
    """Adds another evaluator's sums to these."""
    if not isinstance(other, PixelEvaluator):
      raise TypeError(f"cannot merge a {type(other).__name__} into a PixelEvaluator")
    self.images += other.images
    for name, total in other.sums.items():
      self.sums[name] = self.sums.get(name, 0.0) + total

  def result(self) -> dict[str, float]:
    """Returns the scores by name."""
    if not self.images:
      raise ValueError("no image was evaluated; is the evaluation split empty?")
    means = {name: total / self.images for name, total in self.sums.items()}
    if "correct" in means:
      means["accuracy"] = means.pop("correct")
    nats = means["nats"]
    scores = {"bits": nats / math.log(2), "log_likelihood": -nats, "images": float(self.images)}
    return {**means, **scores}
