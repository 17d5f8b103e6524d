"""The train state, and the training step of tasks with one optimizer, for the whole batch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec

from vit_jax_zoo.ops.sharding import BATCH_AXES
from vit_jax_zoo.tasks.base import Batch, LossContext, Mean, Predictions, Task, Variables
from vit_jax_zoo.training.optim import Optimizer

Metrics: TypeAlias = dict[str, Mean]
PredictStep: TypeAlias = Callable[[Variables, Batch], Predictions]


@struct.dataclass
class TrainState:
  """Input and output of a training step, or its shapes, shardings or specs; all is checkpointed."""

  step: Any  # int32 []: training steps completed, and so the position in the training data
  params: Any  # float32
  model_state: Any  # the other variable collections (`batch_stats`, ...)
  opt_state: Any  # a tuple: of each of `Task.optim_groups`
  ema: Any  # moving averages of params and model state, in the form of `variables`; or None
  rng: Any  # uint32 [2]: key data, from which the key of each step is derived; constant

  @property
  def variables(self) -> Variables:
    """The variables for predictions: the averages if there are any, else the latest."""
    return self.latest_variables if self.ema is None else self.ema

  @property
  def latest_variables(self) -> Variables:
    """`params` and the other collections after the last step."""
    return {"params": self.params, **self.model_state}


TrainStep: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def create_state(
  task: Task,
  optimizers: Sequence[Optimizer],
  variables: Variables,
  rng: jax.Array,
  *,
  with_ema: bool,
) -> TrainState:
  """Returns the state before the first step, with an optimizer for each of the task's groups."""
  params = variables["params"]
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    model_state={name: value for name, value in variables.items() if name != "params"},
    opt_state=tuple(
      optimizer.tx.init(group.select(params))
      for optimizer, group in zip(optimizers, task.optim_groups, strict=True)
    ),
    ema=jax.tree.map(jnp.copy, dict(variables)) if with_ema else None,
    rng=jax.random.key_data(rng),
  )


def make_train_step(
  task: Task, optimizer: Optimizer, *, accumulation_steps: int = 1, ema_decay: float | None = None
) -> TrainStep:
  """Returns `train_step(state, batch) -> (state, metrics)`, not yet compiled."""

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    normalizers = task.normalizers(batch)

    def loss_fn(params: Any, model_state: Any, batch: Batch, rng: jax.Array) -> tuple[Any, Any]:
      variables = {"params": optimizer.stop_frozen(params), **model_state}
      output = task.loss(variables, batch, LossContext(rng, state.step, normalizers))
      return output.loss, output

    grad_fn = accumulate(jax.value_and_grad(loss_fn, has_aux=True), accumulation_steps)
    (_, output), grads = grad_fn(state.params, state.model_state, batch, update_rng(state))
    updates, opt_state = optimizer.tx.update(grads, state.opt_state[0], state.params)
    params = optax.apply_updates(state.params, updates)

    state = dataclasses.replace(
      state,
      step=state.step + 1,
      params=params,
      model_state=output.model_state,
      opt_state=(opt_state,),
    )
    metrics = {**output.metrics, "gradient_norm": Mean.of(optax.tree.norm(grads))}
    return update_ema(state, ema_decay), metrics

  return train_step


def update_rng(state: TrainState, group: int = 0, update: int = 0) -> jax.Array:
  """Returns the random key of one update of one of the task's `optim_groups` in this step."""
  rng = jax.random.wrap_key_data(state.rng)
  for number in (state.step, group, update):
    rng = jax.random.fold_in(rng, number)
  return rng


def accumulate(grad_fn: Callable[..., Any], num_micro_batches: int) -> Callable[..., Any]:
  """Sums gradients, losses and metrics over micro-batches, in a scan.

  Losses are divided by the normalizers of the whole batch, so that the sum is its gradient.
  `grad_fn` is `(params, model_state, batch, rng) -> ((loss, LossOutput), grads)`.
  """
  if num_micro_batches == 1:
    return grad_fn

  def accumulated(params: Any, model_state: Any, batch: Any, rng: jax.Array) -> Any:
    def add(carry: tuple[Any, Any], x: tuple[Any, Any]) -> tuple[tuple[Any, Any], Any]:
      (grads, model_state), (index, micro_batch) = carry, x
      (_, output), more = grad_fn(params, model_state, micro_batch, jax.random.fold_in(rng, index))
      grads = jax.tree.map(jnp.add, grads, more)
      return (grads, output.model_state), dataclasses.replace(output, model_state=None)

    indices, parts = jnp.arange(num_micro_batches), split_batch(batch, num_micro_batches)
    start = jax.tree.map(jnp.zeros_like, params), model_state
    (grads, model_state), outputs = jax.lax.scan(add, start, (indices, parts))
    total = jax.tree.map(lambda x: jnp.sum(x, axis=0), outputs)
    output = dataclasses.replace(total, model_state=model_state)
    return (output.loss, output), grads

  return accumulated


def split_batch(batch: Any, count: int) -> Any:
  """Splits `[b ...]` into `[count b/count ...]`, each micro-batch spread over all devices.

  Micro-batch i takes examples i, i + count, ...: no example moves to another device.
  """

  def split(x: jax.Array) -> jax.Array:
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    if set(BATCH_AXES) <= set(jax.sharding.get_abstract_mesh().axis_names):
      x = jax.lax.with_sharding_constraint(x, PartitionSpec(None, BATCH_AXES))
    return x

  return jax.tree.map(split, batch)


def update_ema(state: TrainState, decay: float | None) -> TrainState:
  """Updates the averages of all variables, BatchNorm's statistics too; None: no averages."""
  if decay is None:
    return state

  def average(past: jax.Array, latest: jax.Array) -> jax.Array:
    if not jnp.issubdtype(latest.dtype, jnp.floating):
      return latest
    # Constant arrays keep their bits over any number of steps.
    return jnp.where(latest == past, latest, past + (1.0 - decay) * (latest - past))

  return dataclasses.replace(state, ema=jax.tree.map(average, state.ema, state.latest_variables))
