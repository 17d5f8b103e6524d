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
  recipe, optimizers, batch_size = config["recipe"], config["optimizer"], config["batch_size"]
  if not (usual := recipe["batch_size"]) or usual == batch_size:
    return []
  far, parts = max(usual / batch_size, batch_size / usual) >= FAR, -(-usual // batch_size)
  keep = f"; or keep the batch: --config.batch_size={usual} --config.accumulation_steps={parts}"
  found = []
  for group, rate in recipe["learning_rates"].items():
    optimizer = optimizers if group == SINGLE else optimizers.get(group, {})
    if not (given := optimizer.get("learning_rate")):
      continue
    scaled = scaled_rate(optimizer["name"], rate, batch_size, usual)
    change = f"batch_size {batch_size} instead of {usual}: {rule_of(optimizer['name'])} scaling"
    if math.isclose(given, scaled, rel_tol=0.02):
      found.append((logging.INFO, f"{change} of the learning rate, {rate:g} -> {given:g}"))
    elif far and not 1 / _CLOSE <= given / scaled <= _CLOSE:
      section = SINGLE if group == SINGLE else f"optimizer.{group}"
      text = f"{change} suggests --config.{section}.learning_rate={scaled:.4g} (now {given:g})"
      found.append((logging.WARNING, text + (keep if batch_size * parts == usual else "")))
  return found
