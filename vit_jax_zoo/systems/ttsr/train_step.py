"""Alternating training step: the updates of the discriminator, then that of the generator.

Each network has its loss, optimizer and `OptimGroup`. Within a step a network is trained against
the others as they are after their own updates.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax_zoo.tasks.base import Batch, LossContext, Mean
from vit_jax_zoo.training.optim import Optimizer
from vit_jax_zoo.training.train_step import (
  Metrics,
  TrainState,
  TrainStep,
  accumulate,
  split_batch,
  update_ema,
  update_rng,
)


def make_train_step(
  task: Any,
  optimizers: Sequence[Optimizer],
  *,
  accumulation_steps: int = 1,
  ema_decay: float | None = None,
) -> TrainStep:
  """Returns `train_step(state, batch) -> (state, metrics)`, not yet compiled.

  Args:
    task: provides `optim_groups`, their losses, and `precompute(variables, batch, context)`: arrays
      `[b ...]` that are constant in the losses of a group.
    optimizers: one for each group.
    accumulation_steps: number of micro-batches, processed one after the other.
    ema_decay: of the moving average of the variables; None: no average.
  """

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    normalizers, metrics = task.normalizers(batch), {}
    for index, group in enumerate(task.optim_groups):
      step = functools.partial(
        _update, task, optimizers[index], index, state, batch, normalizers, accumulation_steps
      )
      if group.begin_step:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step)[-1])
        same = group.select(state.params), state.model_state, state.opt_state[index], zeros
        updated = jax.lax.cond(state.step >= group.begin_step, step, lambda same=same: same)
      else:
        updated = step()
      own, model_state, opt_state, of_group = updated
      metrics |= of_group
      state = dataclasses.replace(
        state,
        params=group.insert(state.params, own),
        model_state=model_state,
        opt_state=(*state.opt_state[:index], opt_state, *state.opt_state[index + 1 :]),
      )
    return update_ema(dataclasses.replace(state, step=state.step + 1), ema_decay), metrics

  return train_step


def _update(
  task: Any,
  optimizer: Optimizer,
  index: int,
  state: TrainState,
  batch: Batch,
  normalizers: Any,
  accumulation_steps: int,
) -> tuple[Any, Any, Any, Metrics]:
  """Returns a group's parameters, the model state, the optimizer state, and the metrics."""
  group = task.optim_groups[index]
  rng = update_rng(state, index, group.updates)
  context = LossContext(rng, state.step, normalizers, group.name)
  precomputed = _precompute(task, state, batch, context, accumulation_steps)

  def loss_fn(own: Any, model_state: Any, batch: Any, rng: jax.Array) -> tuple[Any, Any]:
    batch, precomputed = batch
    params = group.insert(state.params, optimizer.stop_frozen(own))
    at = dataclasses.replace(context, rng=rng, precomputed=precomputed)
    output = task.loss({"params": params, **model_state}, batch, at)
    return output.loss, output

  grad_fn = accumulate(jax.value_and_grad(loss_fn, has_aux=True), accumulation_steps)
  own, model_state = group.select(state.params), state.model_state
  opt_state, metrics = state.opt_state[index], {}
  for number in range(group.updates):
    rng = update_rng(state, index, number)
    (_, output), grads = grad_fn(own, model_state, (batch, precomputed), rng)
    updates, opt_state = optimizer.tx.update(grads, opt_state, own)
    own, model_state = optax.apply_updates(own, updates), output.model_state
    norm = Mean.of(optax.tree.norm(grads))
    metrics = {**output.metrics, f"{group.name}_gradient_norm": norm}
  return own, model_state, opt_state, metrics


def _precompute(
  task: Any, state: TrainState, batch: Batch, context: LossContext, parts: int
) -> Any:
  """Returns `task.precompute` of the whole batch, computed one micro-batch after the other."""

  def one(part: Batch) -> Any:
    return task.precompute(state.latest_variables, part, context)

  if parts == 1:
    return one(batch)
  found = jax.lax.map(one, split_batch(batch, parts))
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), found)
