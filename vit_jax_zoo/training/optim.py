"""Optimizers and learning-rate schedules by name, with weight decay and rules as data.

One update, with gradients g, parameters p, the learning rate B s(t) (base B, schedule's shape s):

1. gradients of frozen parameters are dropped; the others are clipped to a global norm;
2. weight decay of mode "l2" adds d p to g: the gradient of d |p|^2 / 2;
3. the optimizer turns g into a direction u;
4. weight decay of mode "decoupled" adds d p to u (AdamW, arXiv:1711.05101, as in optax and torch:
   the learning rate scales the decay);
5. p moves by -B s(t) m u, where m is the parameter's own multiplier;
6. weight decay of mode "fully_decoupled" moves p by a further -s(t) d p: neither base rate nor
   multiplier scale it. The AugReg and ViT-S recipes use this mode (arXiv:2106.10270,
   arXiv:2205.01580); their 1e-4 at a rate of 1e-3 equals 0.1 of mode "decoupled".

Parameters with two or more dimensions decay, except those named `bias` or `scale`. The leading
layer axis of scanned blocks (".../blocks/attention/...") is not counted. Attention biases of shape
[heads, head_dim] do not decay; embeddings, class tokens and kernels do.

A schedule is a function of the number t of completed updates: the first one of a run uses
`schedule(0)`. docs/reference/training.md has their formulas. Linear and cosine are those of the ViT
paper's code (`create_learning_rate_schedule` in google-research/vision_transformer). A number of
steps is an int, or a float below 1: that fraction of all steps.
"""

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from absl import logging
from flax import traverse_util
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vit_jax_zoo.errors import check_names
from vit_jax_zoo.training.distributed import is_primary

Schedule: TypeAlias = Callable[[Any], Any]  # completed updates, may be traced -> learning rate

Config: TypeAlias = Mapping[str, Any] | ConfigDict
Number: TypeAlias = int | float
Steps: TypeAlias = Number
Transformation: TypeAlias = optax.GradientTransformation
Settings: TypeAlias = Mapping[str, dict[str, Any]]  # of `rules`, by path of the parameter


def scale_by_adam(
  b1: Number = 0.9,
  b2: Number = 0.999,
  eps: Number = 1e-8,
  *,
  mu_dtype: Any = None,
  nesterov: bool = False,
) -> Transformation:
  """Returns Adam's direction. Kingma & Ba, arXiv:1412.6980, algorithm 1.

  Arguments and state are those of `optax.scale_by_adam`, whose bias correction 1 - b^t loses half
  of float32's digits in the first steps.
  """

  def init(params: Any) -> optax.ScaleByAdamState:
    mu = optax.tree.zeros_like(params, dtype=mu_dtype)
    return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, optax.tree.zeros_like(params))

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
    del params
    mu = jax.tree.map(lambda g, m: (1 - b1) * g + b1 * m, updates, state.mu)
    nu = jax.tree.map(lambda g, n: (1 - b2) * g * g + b2 * n, updates, state.nu)
    count = jnp.asarray(optax.safe_increment(state.count))
    mean = jax.tree.map(lambda m: m / _correction(b1, count), mu)
    if nesterov:
      ahead = jax.tree.map(lambda m: m / _correction(b1, jnp.add(count, 1)), mu)
      now = _correction(b1, count)
      mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g / now, ahead, updates)
    root = lambda n: jnp.sqrt(n / _correction(b2, count)) + eps  # noqa: E731
    direction = jax.tree.map(lambda m, n: m / root(n), mean, nu)
    return direction, optax.ScaleByAdamState(count, optax.tree.cast(mu, mu_dtype), nu)

  return Transformation(init, update)


def _correction(decay: float, count: jax.Array) -> jax.Array | float:
  """Returns 1 - decay^count, accurate to the last digit: the logarithm is computed in float64."""
  return -jnp.expm1(count.astype(jnp.float32) * math.log(decay)) if decay else 1.0


_FIELDS = (
  "name", "learning_rate", "schedule", "weight_decay", "weight_decay_mode", "clip_norm", "rules",
)  # fmt: skip
_RULE_FIELDS = ("learning_rate", "weight_decay", "frozen")
_CHECKED_LATER = ("name", "learning_rate", "schedule", "weight_decay_mode", "clip_norm", "rules")


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Gradient transformation, schedule, and mask of the frozen parameters."""

  tx: Transformation
  schedule: Schedule  # by training step, from 0; it is 0 before `begin_step`
  frozen: Any  # tree with the structure of the parameters; True for frozen ones

  def stop_frozen(self, params: Any) -> Any:
    """Stops the gradients of frozen parameters, so that XLA does not compute them."""
    return jax.tree.map(lambda p, f: jax.lax.stop_gradient(p) if f else p, params, self.frozen)


def create_optimizer(
  config: Config, abstract_params: Any, num_steps: int, begin_step: int = 0, updates: int = 1
) -> Optimizer:
  """Creates the optimizer of a group's parameters, a nested dict of arrays or shapes.

  `config` has `name` (of `OPTIMIZERS`), `learning_rate`; optionally `schedule` (see
  `create_schedule`), `weight_decay` (0), `weight_decay_mode` (default: that in `OPTIMIZERS`),
  `clip_norm` (None), `rules`, and fields of the named optimizer (`b1`, `momentum`, ...). Rules are
  (pattern, dict), matched with the whole "/"-joined path of each parameter; the dict sets
  `learning_rate` or `weight_decay` (multipliers, the latter also for parameters that do not decay
  by default) or `frozen`. The first matching rule that sets one applies.

  `num_steps` is the length of the run, `begin_step` the first step with an update, at which the
  schedule starts, and `updates` the number of updates in a step.

  Raises ValueError for an unknown name or field, a rule without a parameter, or all frozen.

  >>> optimizer = create_optimizer(
  ...   dict(name="adamw", learning_rate=1e-3, rules=[(".*/bias", dict(frozen=True))]),
  ...   {"head": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}, num_steps=10)
  >>> optimizer.frozen
  {'head': {'kernel': False, 'bias': True}}
  """
  fields = dict(config)
  kind, direction = _direction_of(fields)
  flat = traverse_util.flatten_dict(plain(abstract_params), sep="/")
  settings = _settings_of(flat, _plain_rules(fields.get("rules") or ()))
  if all(setting["frozen"] for setting in settings.values()):
    raise ValueError("optimizer.rules: all parameters are frozen; expected one to train")
  schedule = create_schedule(fields, max(num_steps - begin_step, 1))
  per_update = lambda count: schedule(count // updates)  # noqa: E731
  chain = _chain(fields, kind, direction, settings, per_update)
  frozen = _tree(settings, lambda setting: setting["frozen"])
  trained = _tree(settings, lambda setting: not setting["frozen"])
  tx = optax.chain(optax.masked(chain, trained), optax.masked(_NO_UPDATE, frozen))

  def delayed(step: Any) -> Any:
    return jnp.where(step < begin_step, 0.0, schedule(jnp.maximum(step - begin_step, 0)))

  return Optimizer(tx, delayed if begin_step else schedule, frozen)


# Adding minus zero keeps the bits of every parameter, including -0.0.
_NO_UPDATE = optax.stateless(lambda grads, _: jax.tree.map(lambda g: jnp.full_like(g, -0.0), grads))


def optimizer_fields(name: str) -> list[str]:
  """Returns the config fields of an optimizer; only the common ones if its name is unknown."""
  return [*_FIELDS, *(fields_of(OPTIMIZERS[name].direction) if name in OPTIMIZERS else [])]


class _Kind(NamedTuple):
  """A named optimizer: a function from config fields to its direction, and the other steps."""

  direction: Callable[..., Transformation]
  decay_mode: str
  after_decay: Transformation | None = None


def _direction_of(fields: Mapping[str, Any]) -> tuple[_Kind, Transformation]:
  for field in ("name", "learning_rate"):
    if field not in fields:
      raise ValueError(f"optimizer: no {field!r}; found {', '.join(fields)}")
  name = fields["name"]
  check_names("optimizer", [name], OPTIMIZERS)
  check_names(f"field of optimizer {name}", fields, optimizer_fields(name))
  for key, value in fields.items():
    if value is None or key in _CHECKED_LATER or key.endswith("dtype"):
      continue
    below = 1 if key in ("b1", "b2", "momentum") else math.inf
    if not (isinstance(value, Number) and 0 <= value < below):
      raise ValueError(f"optimizer.{key}: {value!r}; expected a number in [0, {below})")
  own = {k: v for k, v in fields.items() if k not in _FIELDS}
  own |= {k: jnp.dtype(v) for k, v in own.items() if k.endswith("dtype") and v is not None}
  return OPTIMIZERS[name], OPTIMIZERS[name].direction(**own)


def _sgd(
  *, momentum: Number | None = None, nesterov: bool = False, accumulator_dtype: Any = None
) -> Transformation:
  if momentum is None:
    return optax.identity()
  return optax.trace(momentum, nesterov, accumulator_dtype)


def _lamb(*, b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-6) -> Any:
  return scale_by_adam(b1, b2, eps)


def _adafactor(
  *,
  decay_rate: Number = 0.8,
  beta2_cap: Number = 0.999,
  min_dim_size_to_factor: int = 32,
  momentum: Number | None = 0.9,
  momentum_dtype: Any = jnp.bfloat16,
  eps: Number = 1e-30,
) -> Transformation:
  """Adafactor of Scaling Vision Transformers (arXiv:2106.04560, section 3.4)."""

  def second_moment_decay(step: Any, exponent: Any) -> Any:
    return jnp.minimum(beta2_cap, 1.0 - (jnp.asarray(step, jnp.float32) + 1.0) ** -exponent)

  scale = optax.scale_by_factored_rms(
    decay_rate=decay_rate,
    min_dim_size_to_factor=min_dim_size_to_factor,
    epsilon=eps,
    decay_rate_fn=second_moment_decay,
  )
  if momentum is None:
    return scale
  return optax.chain(scale, optax.ema(momentum, debias=False, accumulator_dtype=momentum_dtype))


OPTIMIZERS = {
  "adafactor": _Kind(_adafactor, "fully_decoupled"),
  "adam": _Kind(scale_by_adam, "l2"),
  "adamw": _Kind(scale_by_adam, "decoupled"),
  "lamb": _Kind(_lamb, "decoupled", optax.scale_by_trust_ratio()),
  "lion": _Kind(optax.scale_by_lion, "decoupled"),
  "sgd": _Kind(_sgd, "l2"),
}


def _plain_rules(rules: Any) -> list[tuple[str, dict[str, Any]]]:
  found = []
  for rule in rules:
    if not (isinstance(rule, list | tuple) and len(rule) == 2 and isinstance(rule[0], str)):
      raise ValueError(f"optimizer rule {rule!r}: not a pair, as ('.*/bias', dict(frozen=True))")
    settings = plain(rule[1])
    check_names(f"setting in optimizer rule {rule[0]!r}:", settings, _RULE_FIELDS)
    try:
      re.compile(rule[0])
    except re.error as error:
      raise ValueError(f"optimizer rule {rule[0]!r}: not a regular expression ({error})") from None
    found.append((rule[0], settings))
  return found


def _settings_of(flat: Mapping[str, Any], rules: Sequence[tuple[str, Any]]) -> Settings:
  """Returns the learning rate, weight decay and `frozen` of each parameter, by path."""
  for pattern, _ in rules:
    if not any(re.fullmatch(pattern, path) for path in flat):
      raise ValueError(
        f"optimizer rule {pattern!r}: matches no parameter (patterns match whole paths); did you "
        f"mean {', '.join(difflib.get_close_matches(pattern, flat, n=3, cutoff=0.0))}?"
      )
  found = {}
  for path, leaf in flat.items():
    decay = float(_decays(path, len(leaf.shape)))
    setting = {"learning_rate": 1.0, "weight_decay": decay, "frozen": False}
    for pattern, fields in reversed(rules):  # so that the first rule overrides the others
      if re.fullmatch(pattern, path):
        setting |= fields
    found[path] = setting
  return found


def _decays(path: str, ndim: int) -> bool:
  *parents, name = path.split("/")
  inside = parents[parents.index("blocks") + 1 :] if "blocks" in parents else ["0"]
  scanned = not (inside and inside[0].isdigit())
  return ndim - scanned >= 2 and name not in ("bias", "scale")


def _tree(settings: Settings, value: Callable[[Mapping[str, Any]], Any]) -> Any:
  return traverse_util.unflatten_dict({k: value(s) for k, s in settings.items()}, sep="/")


def _chain(
  fields: Config, kind: _Kind, direction: Transformation, settings: Settings, schedule: Schedule
) -> Transformation:
  """Returns steps 1 to 6 of the module's docstring, for the parameters that are trained."""
  mode = fields.get("weight_decay_mode") or kind.decay_mode
  check_names("weight_decay_mode", [mode], ("l2", "decoupled", "fully_decoupled"))
  amount, base = float(fields.get("weight_decay") or 0.0), float(fields["learning_rate"])
  decay = {}
  if amount:  # optax.add_decayed_weights has one rate for all parameters
    add = lambda u, p, d: u + d * p if d else u  # noqa: E731
    decay = {mode: [_per_parameter(settings, lambda s: amount * s["weight_decay"], add)]}
  clip_norm = fields.get("clip_norm")
  if clip_norm is not None and not (isinstance(clip_norm, Number) and clip_norm > 0):
    raise ValueError(f"optimizer.clip_norm: {clip_norm!r}; expected a number above 0, or None")
  clip = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
  steps = [*clip, *decay.get("l2", []), direction, *decay.get("decoupled", [])]
  steps += [kind.after_decay] if kind.after_decay else []
  if any(setting["learning_rate"] != 1.0 for setting in settings.values()):
    steps += [_per_parameter(settings, lambda s: float(s["learning_rate"]), lambda u, _, m: u * m)]
  if last := decay.get("fully_decoupled"):
    if not base:
      raise ValueError("learning_rate: 0; weight_decay_mode='fully_decoupled' needs one above 0")
    scaled = optax.scale_by_schedule(lambda t: -schedule(t) / base)
    return optax.chain(*steps, optax.scale(base), *last, scaled)
  return optax.chain(*steps, optax.scale_by_schedule(lambda t: -schedule(t)))


def _per_parameter(
  settings: Settings, value: Callable[[Any], float], apply: Callable[[Any, Any, float], Any]
) -> Transformation:
  """Returns the transformation `apply(update, parameter, value(setting))` of each parameter."""
  # `optax.masked` passes trees with an empty node for each frozen parameter.
  values = _tree(settings, lambda s: optax.MaskedNode() if s["frozen"] else value(s))
  return optax.stateless(lambda updates, params: jax.tree.map(apply, updates, params, values))


def create_schedule(config: Config, num_steps: int) -> Schedule:
  """Creates a schedule for a run of this length; ValueError for an unknown or invalid field.

  `config` has the base `learning_rate`, and `schedule`: `name` (default: constant) and fields.

  >>> config = dict(learning_rate=0.1, schedule=dict(name="cosine", warmup_steps=10))
  >>> float(create_schedule(config, 100)(5))
  0.05...
  """
  base = config["learning_rate"]
  if not (isinstance(base, Number) and 0 <= base < math.inf):
    raise ValueError(f"optimizer.learning_rate: {base!r}; expected a finite number >= 0")
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
  if not (isinstance(start, Number) and 0 <= start <= 1):
    raise ValueError(f"warmup_start: {start!r}; expected a fraction of the rate, in [0, 1]")
  make = _SCHEDULES[name]
  known = [*fields_of(make), "warmup_steps", "warmup_start", "name"]
  check_names(f"field of the {name} schedule", fields, known)
  after_warmup = make(float(base), num_steps, warmup_steps, **fields)

  def schedule(step: Any) -> Float[Array, ""]:
    step = jnp.asarray(step, jnp.float32)
    rate = after_warmup(step)
    if warmup_steps:  # optax.linear_schedule loses most digits of the first steps
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
  """Inverse square root, of Scaling Vision Transformers (arXiv:2106.04560)."""
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
  if not (cooldown := count_steps("cooldown_steps", steps, num_steps)):
    if end_value:
      raise ValueError(f"end_value: {end_value} has no effect without cooldown_steps; set them too")
    return rate

  def cooled(step: jax.Array) -> jax.Array:
    left = jnp.clip((num_steps - step) / cooldown, 0.0, 1.0)
    return end_value + (rate(step) - end_value) * left

  return cooled


_SCHEDULES: dict[str, Callable[..., Schedule]] = {
  "constant": _constant, "linear": _linear, "cosine": _cosine, "poly": _poly, "rsqrt": _rsqrt,
  "step": _step,
}  # fmt: skip
