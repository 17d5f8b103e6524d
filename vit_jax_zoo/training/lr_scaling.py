"""Other batches than a recipe's: which learning rate is due, and what a user should know.

| optimizer  | rule   | learning rate                 | from                                    |
|------------|--------|-------------------------------|-----------------------------------------|
| sgd        | linear | the recipe's * ratio          | Goyal et al., arXiv:1706.02677          |
| all others | root   | the recipe's * ratio ** (1/2) | Malladi et al., arXiv:2205.10287 (Adam) |

where the ratio is that of the batch sizes. For lamb the root is You et al.'s (arXiv:1904.00962),
for others it is what is usually done. These are rules of thumb: they keep what an epoch does about
the same, and nothing replaces a search on held-out images. The same batch in parts needs no rule:
`accumulation_steps`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

FAR = 4
"""A batch is far from the recipe's if it is so many times smaller or larger."""

_CLOSE = 2
"""A learning rate is left uncommented within this factor of what is due."""

SINGLE = "optimizer"
"""What the one optimizer of a task without players is called in `recipe.learning_rates`."""


def rule_of(optimizer: str) -> str:
  """Returns which rule an optimizer's learning rate follows: "linear" or "root"."""
  return "linear" if optimizer == "sgd" else "root"


def scaled_rate(optimizer: str, rate: float, batch_size: int, recipe_batch_size: int) -> float:
  """Returns the learning rate that is due for a batch, from that of the recipe.

  Args:
    optimizer: its name.
    rate: the recipe's learning rate.
    batch_size: images of a step, on all devices together.
    recipe_batch_size: for which the rate was chosen.

  >>> scaled_rate("sgd", 0.03, 32, 512), scaled_rate("adamw", 1e-4, 16, 64)
  (0.001875, 5e-05)
  """
  ratio = batch_size / recipe_batch_size
  return rate * (ratio if rule_of(optimizer) == "linear" else math.sqrt(ratio))


@dataclasses.dataclass(frozen=True)
class Advice:
  """What to say about a batch and its learning rate; a warning, if something should be changed."""

  text: str
  is_warning: bool


def advise(config: Mapping[str, Any]) -> list[Advice]:
  """Compares a config's batch and learning rates with those of its recipe.

  Args:
    config: `batch_size`; `optimizer`, one or one for each player; `recipe`: `batch_size` and
      `learning_rates` by player (`SINGLE`, where there is but one).

  Returns:
    Nothing where the recipe states no batch or the batch is its own, or where it is near enough
    and the learning rates are those that are due.
  """
  recipe, batch_size = config["recipe"], config["batch_size"]
  usual = recipe["batch_size"]
  if not usual or usual == batch_size:
    return []
  optimizers = config["optimizer"]
  by_player = {SINGLE: optimizers} if "name" in optimizers else optimizers
  found = []
  for player, rate in recipe["learning_rates"].items():
    if player in by_player and by_player[player]["learning_rate"]:
      found.append(_advise(player, by_player[player], rate, batch_size, usual))
  return [advice for advice in found if advice is not None]


def _advise(
  player: str, optimizer: Mapping[str, Any], rate: float, batch_size: int, usual: int
) -> Advice | None:
  name, given = optimizer["name"], optimizer["learning_rate"]
  due = scaled_rate(name, rate, batch_size, usual)
  section = "optimizer" if player == SINGLE else f"optimizer.{player}"
  sizes = f"batch_size {batch_size} is {_times(batch_size, usual)} the recipe's {usual}"
  rule = f"the {rule_of(name)} rule of {name}"
  if math.isclose(given, due, rel_tol=0.02):
    return Advice(f"{sizes}; the learning rate follows it by {rule}: {rate:g} -> {given:g}", False)
  far = max(usual / batch_size, batch_size / usual) >= FAR
  if not far or 1 / _CLOSE <= given / due <= _CLOSE:
    return None
  parts = -(-usual // batch_size)
  whole = f", or keep the recipe's batch in parts: --config.batch_size={usual} "
  whole += f"--config.accumulation_steps={parts}"
  return Advice(
    f"{sizes}: by {rule} its learning rate of {rate:g} becomes {due:.4g}, and this run has "
    f"{given:g}; set --config.{section}.learning_rate={due:.4g}"
    + (whole if batch_size * parts == usual else ""),
    is_warning=True,
  )


def _times(batch_size: int, usual: int) -> str:
  """Says how large a batch is beside the usual one."""
  if batch_size < usual:
    return f"1/{usual / batch_size:.3g} of"
  return f"{batch_size / usual:.3g} times"
