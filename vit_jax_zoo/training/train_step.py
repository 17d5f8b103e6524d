"""The training step: a pure function of state and batch, the same for every task.

    for each player, in order:
      what its losses take of the others (`Task.observe`)
      as often as it moves:
        gradients of its loss in its own parameters, summed over the micro-batches
        optimizer update
    average of the parameters and the other variables

The step is written for the whole batch. Where its parts run, and what is summed over devices, XLA
derives from the shardings with which the loop compiles it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from vit_jax_zoo.ops.sharding import BATCH_AXES
from vit_jax_zoo.tasks.base import (
  Batch,
  LossContext,
  LossOutput,
  Mean,
  Player,
  Predictions,
  Task,
  Variables,
)
from vit_jax_zoo.training.optim import Optimizer
from vit_jax_zoo.training.state import TrainState, player_params, with_player_params

Metrics: TypeAlias = dict[str, Mean]
TrainStep: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
PredictStep: TypeAlias = Callable[[Variables, Batch], Predictions]


def make_train_step(
  task: Task,
  optimizers: Sequence[Optimizer],
  *,
  accumulation_steps: int = 1,
  ema_decay: float | None = None,
) -> TrainStep:
  """Returns `train_step(state, batch) -> (state, metrics)`, not yet compiled.

  Args:
    task: gives the losses.
    optimizers: one for each of the task's players.
    accumulation_steps: into how many micro-batches a batch is cut; they run one after the other,
      and give the gradient of the whole batch up to float rounding.
    ema_decay: weight of the past in the average of the variables; None keeps no average.
  """

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    step_rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    normalizers = task.normalizers(batch)
    opt_states, metrics = list(state.opt_state), {}
    for index, player in enumerate(task.players):
      rng = jax.random.fold_in(step_rng, index)
      context = LossContext(rng=rng, step=state.step, normalizers=normalizers, player=player.name)
      state, opt_states[index], found = _take_turn(
        task, player, optimizers[index], state, opt_states[index],
        _micro_batches(batch, accumulation_steps), context,
      )  # fmt: skip
      metrics |= found
    ema = state.ema
    if ema_decay is not None:
      ema = _average(ema, state.latest_variables, ema_decay)
    state = dataclasses.replace(state, step=state.step + 1, opt_state=tuple(opt_states), ema=ema)
    return state, metrics

  return train_step


def _average(past: Variables, latest: Variables, decay: float) -> Variables:
  """Moves the averages towards the latest values.

  Statistics such as BatchNorm's are averaged too: those of the latest parameters do not fit the
  averaged ones. What is no float (a counter, a seed) has no average, and is the latest.
  """

  def average(past: jax.Array, latest: jax.Array) -> jax.Array:
    if not jnp.issubdtype(latest.dtype, jnp.floating):
      return latest
    # Whatever never changes shall keep its bits, over any number of steps.
    return jnp.where(latest == past, latest, past + (1.0 - decay) * (latest - past))

  return jax.tree.map(average, past, latest)


def _take_turn(
  task: Task,
  player: Player,
  optimizer: Optimizer,
  state: TrainState,
  opt_state: Any,
  micro_batches: Batch,
  context: LossContext,
) -> tuple[TrainState, Any, Metrics]:
  """Lets one player make its updates of a step.

  Returns:
    The state, the state of the player's optimizer, and the metrics of its last update.
  """

  def move(_: None) -> tuple[Any, Any, Any, Metrics]:
    observed = _observe(task, state, micro_batches, context)
    moved, new_opt_state, metrics = state, opt_state, {}
    for update in range(player.updates):
      at = dataclasses.replace(context, rng=jax.random.fold_in(context.rng, update))
      moved, new_opt_state, metrics = _move(
        task, player, optimizer, moved, new_opt_state, (micro_batches, observed), at
      )
    return moved.params, moved.model_state, new_opt_state, metrics

  def stand_still(_: None) -> tuple[Any, Any, Any, Metrics]:
    metrics = jax.eval_shape(move, None)[-1]
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), metrics)
    return state.params, state.model_state, opt_state, nothing

  if player.begin_step:
    outcome = jax.lax.cond(context.step >= player.begin_step, move, stand_still, None)
  else:
    outcome = move(None)
  params, model_state, opt_state, metrics = outcome
  state = dataclasses.replace(state, params=params, model_state=model_state)
  return state, opt_state, metrics


def _move(
  task: Task,
  player: Player,
  optimizer: Optimizer,
  state: TrainState,
  opt_state: Any,
  given: tuple[Batch, Any],
  context: LossContext,
) -> tuple[TrainState, Any, Metrics]:
  """Lets one player make one update, of micro-batches and what was observed on each."""
  grads, output = _gradients(task, player, state, given, context)
  grads = optimizer.freeze(grads)
  own = player_params(state.params, player)
  updates, opt_state = optimizer.update(grads, opt_state, own)
  params = with_player_params(state.params, player, optimizer.apply(own, updates))
  name = "gradient_norm" if player.name is None else f"{player.name}_gradient_norm"
  metrics = {**output.metrics, name: Mean.of(optax.tree.norm(grads))}
  state = dataclasses.replace(state, params=params, model_state=output.model_state)
  return state, opt_state, metrics


def _observe(task: Task, state: TrainState, micro_batches: Batch, context: LossContext) -> Any:
  """Returns what the player observes, `[count ...]`: once, as the others stand still meanwhile."""

  def observe(x: tuple[jax.Array, Batch]) -> Any:
    index, batch = x
    rng = jax.random.fold_in(jax.random.fold_in(context.rng, _OBSERVING), index)
    at = dataclasses.replace(context, rng=rng)
    return task.observe(state.latest_variables, batch, at)

  count = jax.tree.leaves(micro_batches)[0].shape[0]
  if count == 1:
    only = observe((jnp.int32(0), jax.tree.map(lambda x: x[0], micro_batches)))
    return jax.tree.map(lambda x: x[None], only)
  return jax.lax.map(observe, (jnp.arange(count), micro_batches))


_OBSERVING = 2**31 - 1
"""Stands for no update of a player: what is observed has randomness of its own."""


def _gradients(
  task: Task, player: Player, state: TrainState, given: tuple[Batch, Any], context: LossContext
) -> tuple[Any, LossOutput]:
  """Sums the gradient of the player's loss, and its metrics, over the micro-batches."""
  own = player_params(state.params, player)

  def loss(
    own: Any, model_state: Any, given: tuple[Batch, Any], context: LossContext
  ) -> tuple[Any, Any]:
    batch, observed = given
    params = with_player_params(state.params, player, own)
    context = dataclasses.replace(context, observed=observed)
    output = task.loss({"params": params, **model_state}, batch, context)
    return output.loss, output

  gradient = jax.grad(loss, has_aux=True)
  count = jax.tree.leaves(given)[0].shape[0]
  if count == 1:
    return gradient(own, state.model_state, jax.tree.map(lambda x: x[0], given), context)

  def accumulate(carry: tuple[Any, Any], x: tuple[Any, Any]) -> tuple[tuple[Any, Any], Any]:
    (grads, model_state), (index, given) = carry, x
    rng = jax.random.fold_in(context.rng, index)
    more, output = gradient(own, model_state, given, dataclasses.replace(context, rng=rng))
    summed = jax.tree.map(jnp.add, grads, more)
    return (summed, output.model_state), dataclasses.replace(output, model_state=None)

  zeros = jax.tree.map(jnp.zeros_like, own)
  (grads, model_state), outputs = jax.lax.scan(
    accumulate, (zeros, state.model_state), (jnp.arange(count), given)
  )
  total = jax.tree.map(lambda x: jnp.sum(x, axis=0), outputs)
  return grads, dataclasses.replace(total, model_state=model_state)


def _micro_batches(batch: Batch, count: int) -> Batch:
  """Cuts `[b ...]` into `[count b/count ...]`, each micro-batch spread over all devices.

  Micro-batch i takes examples i, i + count, ...: no example moves to another device.
  """

  def cut(x: jax.Array) -> jax.Array:
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    if count > 1 and set(BATCH_AXES) <= set(jax.sharding.get_abstract_mesh().axis_names):
      x = jax.lax.with_sharding_constraint(x, PartitionSpec(None, BATCH_AXES))
    return x

  return jax.tree.map(cut, batch)
