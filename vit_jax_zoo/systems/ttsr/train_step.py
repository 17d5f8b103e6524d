"""Alternating training step: the updates of the discriminator, then that of the generator.

Each network has its loss, optimizer and `OptimGroup`. Within a step a network is trained against
the others as they are after their own updates.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax_zoo.tasks.base import Batch, LossContext, Mean, OptimGroup
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
    accumulation_steps: number of micro-batches of a batch; they are processed one after the other.
    ema_decay: decay of the moving average of the variables; None: no average.
  """
  steps = [
    _Group(task, group, index, optimizer, accumulation_steps)
    for index, (group, optimizer) in enumerate(zip(task.optim_groups, optimizers, strict=True))
  ]

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    normalizers, metrics = task.normalizers(batch), {}
    for step in steps:
      state, of_group = step(state, batch, normalizers)
      metrics |= of_group
    return update_ema(dataclasses.replace(state, step=state.step + 1), ema_decay), metrics

  return train_step


@dataclasses.dataclass(frozen=True)
class _Group:
  """The part of a training step that updates one group of parameters."""

  task: Any
  group: OptimGroup
  index: int
  optimizer: Optimizer
  accumulation_steps: int

  def __call__(self, state: TrainState, batch: Batch, normalizers: Any) -> tuple[TrainState, Any]:
    group = self.group

    def update(_: None) -> Any:
      return self.update(state, batch, normalizers)

    def skip(_: None) -> Any:
      metrics = jax.eval_shape(update, None)[-1]
      zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), metrics)
      return group.select(state.params), state.model_state, state.opt_state[self.index], zeros

    if group.begin_step:
      begun = state.step >= group.begin_step
      own, model_state, opt_state, metrics = jax.lax.cond(begun, update, skip, None)
    else:
      own, model_state, opt_state, metrics = update(None)
    opt_states = list(state.opt_state)
    opt_states[self.index] = opt_state
    params = group.insert(state.params, own)
    return dataclasses.replace(
      state, params=params, model_state=model_state, opt_state=tuple(opt_states)
    ), metrics

  def update(self, state: TrainState, batch: Batch, normalizers: Any) -> tuple[Any, ...]:
    """Returns the group's parameters, the model state, the optimizer state, and the metrics."""
    group, optimizer = self.group, self.optimizer
    context = LossContext(
      update_rng(state, self.index, group.updates), state.step, normalizers, group.name
    )
    precomputed = self.precompute(state, batch, context)

    def loss_fn(own: Any, model_state: Any, batch: Any, rng: jax.Array) -> tuple[Any, Any]:
      batch, precomputed = batch
      params = group.insert(state.params, optimizer.stop_frozen(own))
      at = dataclasses.replace(context, rng=rng, precomputed=precomputed)
      output = self.task.loss({"params": params, **model_state}, batch, at)
      return output.loss, output

    grad_fn = accumulate(jax.value_and_grad(loss_fn, has_aux=True), self.accumulation_steps)
    own, model_state = group.select(state.params), state.model_state
    opt_state, metrics = state.opt_state[self.index], {}
    for number in range(group.updates):
      rng = update_rng(state, self.index, number)
      (_, output), grads = grad_fn(own, model_state, (batch, precomputed), rng)
      updates, opt_state = optimizer.tx.update(grads, opt_state, own)
      own = optax.apply_updates(own, updates)
      model_state = output.model_state
      norm = Mean.of(optax.tree.norm(grads))
      metrics = {**output.metrics, f"{group.name}_gradient_norm": norm}
    return own, model_state, opt_state, metrics

  def precompute(self, state: TrainState, batch: Batch, context: LossContext) -> Any:
    """Returns `task.precompute` of the whole batch, computed one micro-batch after the other."""

    def one(part: Batch) -> Any:
      return self.task.precompute(state.latest_variables, part, context)

    if self.accumulation_steps == 1:
      return one(batch)
    parts = jax.lax.map(one, split_batch(batch, self.accumulation_steps))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)
