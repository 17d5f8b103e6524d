"""Learning-rate schedules by name, with warm-up and cool-down.

A schedule is a function of the number t of completed updates: the first update of a run uses
`schedule(0)`. A warm-up starts at the fraction f = `warmup_start` of the rate, 0 by default. With w
warm-up steps, T steps in total, the progress p = clip((t - w) / (T - w), 0, 1), base rate B and end
value E:

| name     | learning rate                                                        |
|----------|----------------------------------------------------------------------|
| constant | B                                                                    |
| linear   | E + (B - E) (1 - p)                                                  |
| cosine   | E + (B - E) (1 + cos(pi p)) / 2                                      |
| poly     | E + (B - E) (1 - p)^power, power 0.9 by default                      |
| rsqrt    | B sqrt(s / (s + max(t - w, 0))), s = timescale (arXiv:2106.04560)    |
| step     | B times the factors of all boundaries <= t, 0.1 by default            |

times the warm-up min(1, f + (1 - f) t / w), of whose first steps `optax.linear_schedule` loses most
digits. `constant` and `rsqrt` may end with a cool-down: linear to E over the last c steps. Linear
and cosine are those of the ViT paper's code (`create_learning_rate_schedule` in
google-research/vision_transformer).

Numbers of steps are ints, or floats below 1: that fraction of all steps.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vit_jax_zoo.errors import check_names
from vit_jax_zoo.training.distributed import is_primary

Schedule: TypeAlias = Callable[[Any], Any]  # completed updates, may be traced -> learning rate

Config: TypeAlias = Mapping[str, Any] | ConfigDict
Number: TypeAlias = int | float
Steps: TypeAlias = Number


def create_schedule(config: Config, num_steps: int) -> Schedule:
  """Creates a schedule for a run of this length; ValueError for an unknown or invalid field.

  `config` has the base `learning_rate`, and `schedule`: `name` (default: constant) and fields.

  >>> config = dict(learning_rate=0.1, schedule=dict(name="cosine", warmup_steps=10))
  >>> float(create_schedule(config, 100)(5))
  0.05...
  """
  _check_not_negative("learning_rate", config["learning_rate"])
  base = float(config["learning_rate"])
  fields = plain(config.get("schedule") or {"name": "constant"})
  name = fields.pop("name", "constant")
  check_names("schedule", [name], _SCHEDULES)
  warmup_steps = count_steps("warmup_steps", fields.pop("warmup_steps", 0), num_steps)
  if warmup_steps >= num_steps and is_primary():
    logging.warning(
      f"schedule.warmup_steps: {warmup_steps} steps in a run of {num_steps}: the learning rate "
      f"does not reach {base:g}; lower it, or give a fraction of all steps, such as 0.05"
    )
  start = fields.pop("warmup_start", 0.0)
  _check_not_negative("warmup_start", start)
  if start > 1:
    raise ValueError(f"warmup_start: {start}; expected a fraction of the rate, in [0, 1]")
  make = _SCHEDULES[name]
  known = [*fields_of(make), "warmup_steps", "warmup_start", "name"]
  check_names(f"field of the {name} schedule", fields, known)
  after_warmup = make(base, num_steps, warmup_steps, **fields)

  def schedule(step: Any) -> Float[Array, ""]:
    step = jnp.asarray(step, jnp.float32)
    rate = after_warmup(step)
    if warmup_steps:
      rate = rate * jnp.minimum(1.0, start + (1 - start) * step / warmup_steps)
    return jnp.asarray(rate, jnp.float32)

  return schedule


def count_steps(field: str, steps: Steps, num_steps: int) -> int:
  """Returns a number of steps, from a number or a fraction of all steps (a float below 1)."""
  if isinstance(steps, float) and 0 <= steps < 1:
    return round(steps * num_steps)
  if isinstance(steps, bool) or steps != int(steps) or steps < 0:
    raise ValueError(f"{field}: {steps}; expected steps >= 0, or a fraction of all steps below 1")
  return int(steps)


def plain(config: Config) -> dict[str, Any]:
  """Returns a mapping or ConfigDict as a new dict."""
  return config.to_dict() if isinstance(config, ConfigDict) else dict(config)


def fields_of(make: Callable[..., Any]) -> list[str]:
  """Returns the names of the arguments with defaults: the config fields."""
  parameters = inspect.signature(make).parameters.values()
  return [p.name for p in parameters if p.default is not inspect.Parameter.empty]


def _check_not_negative(field: str, value: Any) -> None:
  if not isinstance(value, int | float) or not 0 <= value < math.inf:
    raise ValueError(f"{field}: {value!r}; expected a finite number >= 0")


def _constant(
  base: float, num_steps: int, _: int, *, end_value: Number = 0.0, cooldown_steps: Steps = 0
) -> Schedule:
  return _with_cooldown(optax.constant_schedule(base), num_steps, cooldown_steps, end_value)


def _linear(base: float, num_steps: int, warmup: int, *, end_value: Number = 0.0) -> Schedule:
  return _poly(base, num_steps, warmup, power=1.0, end_value=end_value)


def _cosine(base: float, num_steps: int, warmup: int, *, end_value: Number = 0.0) -> Schedule:
  def rate(step: jax.Array) -> jax.Array:  # optax rounds pi t before it divides by T
    progress = jnp.clip((step - warmup) / max(num_steps - warmup, 1), 0.0, 1.0)
    return end_value + (base - end_value) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

  return rate


def _poly(
  base: float, num_steps: int, warmup: int, *, power: Number = 0.9, end_value: Number = 0.0
) -> Schedule:
  if not power > 0:
    raise ValueError(f"schedule.power: {power}; expected a number above 0")
  return optax.polynomial_schedule(base, end_value, power, max(num_steps - warmup, 1), warmup)


def _rsqrt(
  base: float,
  num_steps: int,
  warmup: int,
  *,
  timescale: Steps = 10_000,
  end_value: Number = 0.0,
  cooldown_steps: Steps = 0,
) -> Schedule:
  scale = count_steps("timescale", timescale, num_steps)
  if scale < 1:
    raise ValueError(f"timescale: {timescale}; expected a number of steps >= 1")

  def rate(step: jax.Array) -> jax.Array:
    return base * jnp.sqrt(scale / (scale + jnp.maximum(step - warmup, 0)))

  return _with_cooldown(rate, num_steps, cooldown_steps, end_value)


def _step(
  base: float,
  num_steps: int,
  _: int,
  *,
  boundaries: Sequence[Steps] = (),
  factors: Sequence[Number] | None = None,
) -> Schedule:
  if not boundaries:
    raise ValueError("schedule.boundaries: missing; expected steps, or fractions of all")
  edges = [count_steps("boundaries", edge, num_steps) for edge in boundaries]
  multipliers = [0.1] * len(edges) if factors is None else list(factors)
  if len(multipliers) != len(edges) or edges != sorted(edges):
    problem = f"schedule.boundaries: {edges}, with {len(multipliers)} factors"
    raise ValueError(f"{problem}; expected an ascending sequence, and one factor for each")
  scales: dict[int, Number] = {}
  for edge, multiplier in zip(edges, multipliers, strict=True):  # fractions may coincide
    scales[edge] = scales.get(edge, 1.0) * multiplier
  return optax.piecewise_constant_schedule(base, scales)


def _with_cooldown(rate: Schedule, num_steps: int, steps: Steps, end_value: Number) -> Schedule:
  cooldown = count_steps("cooldown_steps", steps, num_steps)
  if not cooldown:
    if end_value:
      raise ValueError(f"end_value: {end_value} has no effect without cooldown_steps; set them too")
    return rate

  def cooled(step: jax.Array) -> jax.Array:
    left = jnp.clip((num_steps - step) / cooldown, 0.0, 1.0)
    return end_value + (rate(step) - end_value) * left

  return cooled


_SCHEDULES: dict[str, Callable[..., Schedule]] = {
  "constant": _constant,
  "linear": _linear,
  "cosine": _cosine,
  "poly": _poly,
  "rsqrt": _rsqrt,
  "step": _step,
}
