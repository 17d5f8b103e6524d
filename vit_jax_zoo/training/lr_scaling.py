"""Learning-rate scaling with batch size: linear for SGD, square root for adaptive optimizers.

Linear: Goyal et al., arXiv:1706.02677. Square root: Malladi et al., arXiv:2205.10287 (Adam), You et
al., arXiv:1904.00962 (lamb). Rules of thumb; `accumulation_steps` keeps the recipe's batch instead.
"""

import math
from collections.abc import Mapping
from typing import Any

from absl import logging

FAR = 4  # ratio of batch sizes from which an unscaled learning rate causes a warning, ...
_CLOSE = 2  # ... unless it is within this factor of the scaled one.

SINGLE = "optimizer"  # name in `recipe.learning_rates` if a task has one optimizer


def rule_of(optimizer: str) -> str:
  """Returns the scaling rule of an optimizer: "linear" or "square-root"."""
  return "linear" if optimizer == "sgd" else "square-root"


def scaled_rate(optimizer: str, rate: float, batch_size: int, recipe_batch_size: int) -> float:
  """Returns the recipe's learning rate, scaled with the global batch size.

  >>> scaled_rate("sgd", 0.03, 32, 512), scaled_rate("adamw", 1e-4, 16, 64)
  (0.001875, 5e-05)
  """
  ratio = batch_size / recipe_batch_size
  return rate * (ratio if rule_of(optimizer) == "linear" else math.sqrt(ratio))


def advise(config: Mapping[str, Any]) -> list[tuple[int, str]]:
  """Returns log levels and lines where batch size and learning rates differ from the recipe's."""
  recipe, batch_size = config["recipe"], config["batch_size"]
  if not recipe["batch_size"] or recipe["batch_size"] == batch_size:
    return []
  optimizers = config["optimizer"]
  by_group = {SINGLE: optimizers} if "name" in optimizers else optimizers
  found = [
    _advise(group, by_group[group], rate, batch_size, recipe["batch_size"])
    for group, rate in recipe["learning_rates"].items()
    if group in by_group and by_group[group]["learning_rate"]
  ]
  return [advice for advice in found if advice is not None]


def _advise(group: str, optimizer: Any, rate: float, batch_size: int, usual: int) -> Any:
  given, rule = optimizer["learning_rate"], rule_of(optimizer["name"])
  scaled = scaled_rate(optimizer["name"], rate, batch_size, usual)
  section = "optimizer" if group == SINGLE else f"optimizer.{group}"
  change = f"batch_size {batch_size} instead of {usual}"
  if math.isclose(given, scaled, rel_tol=0.02):
    return logging.INFO, f"{change}: {rule} scaling of the learning rate, {rate:g} -> {given:g}"
  far = max(usual / batch_size, batch_size / usual) >= FAR
  if not far or 1 / _CLOSE <= given / scaled <= _CLOSE:
    return None
  parts = -(-usual // batch_size)
  keep = f"; or keep the batch: --config.batch_size={usual} --config.accumulation_steps={parts}"
  advice = f"{rule} scaling suggests --config.{section}.learning_rate={scaled:.4g} (now {given:g})"
  return logging.WARNING, f"{change}: {advice}{keep if batch_size * parts == usual else ''}"
