"""The training step: the same numbers on any mesh and in any number of micro-batches."""

import functools

import jax
import numpy as np
import pytest

from tests.train import toy
from vit_jax_zoo.train import sharding
from vit_jax_zoo.train.program import Recipe, abstract_batch_of, build_program

ADAMW = {"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1, "clip_norm": 1.0}


def program(task, batch, *, mesh=None, optimizer=None, **kwargs):
  return build_program(
    task,
    abstract_batch_of(batch, len(batch["x"])),
    Recipe(optimizer or ADAMW, num_steps=100, **kwargs),
    mesh=sharding.create_mesh(mesh or {"data": 1}, jax.devices()[: 1 if mesh is None else None]),
    rules=toy.RULES,
  )


def losses(task, num_steps, **kwargs):
  """Trains a few steps; returns the losses and the last state, on the host."""
  data = toy.batches(num_steps)
  made = program(task, data[0], **kwargs)
  with jax.set_mesh(made.mesh):
    state, found = made.initial_state(seed=0), []
    for batch in data:
      state, metrics = made.train_step(state, sharding.to_global(batch, made.mesh))
      found.append(float(metrics["loss"].compute()))
    return np.array(found), toy.host(state)


@functools.cache
def one_device_losses():
  return losses(toy.Regression(), 6, ema_decay=0.9)


@pytest.mark.multidevice
@pytest.mark.parametrize(
  "mesh",
  [
    {"data": -1},
    {"data": 1, "fsdp": -1},
    {"data": 2, "fsdp": 2, "model": 2},
    {"data": 1, "model": -1},
  ],
  ids=str,
)
def test_every_mesh_computes_the_same(mesh):
  expected, state = one_device_losses()
  found, sharded = losses(toy.Regression(), 6, ema_decay=0.9, mesh=mesh)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  # Includes BatchNorm's statistics: they are those of the whole batch on every mesh.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
    (sharded.model_state, sharded.ema_params),
    (state.model_state, state.ema_params),
  )


@pytest.mark.multidevice
@pytest.mark.parametrize("mesh", [None, {"data": -1}], ids=str)
def test_accumulation_equals_the_large_batch(mesh):
  task = toy.Regression(toy.ToyNet(batch_norm=False))
  expected, state = losses(task, 4)
  found, accumulated = losses(task, 4, mesh=mesh, accumulation_steps=2)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    accumulated.params,
    state.params,
  )


def test_training_learns_and_the_average_lags_behind():
  found, state = losses(toy.Regression(), 40, ema_decay=0.99)
  assert found[-5:].mean() < 0.5 * found[:5].mean()
  lag = np.abs(state.params["wide"]["kernel"] - state.ema_params["wide"]["kernel"]).max()
  assert lag > 1e-3
  assert state.variables["params"] is state.ema_params
  assert "batch_stats" in state.variables


def test_each_step_draws_new_randomness_that_the_seed_decides():
  task = toy.Regression(toy.ToyNet(dropout_rate=0.5, batch_norm=False))
  frozen = {"name": "sgd", "learning_rate": 0.0}
  batch = toy.batches(1)[0]
  made = program(task, batch, optimizer=frozen)

  def draw(seed):
    with jax.set_mesh(made.mesh):
      state, found = made.initial_state(seed=0), []
      state = state.replace(rng=jax.random.key_data(jax.random.key(seed)))
      for _ in range(3):
        state, metrics = made.train_step(state, sharding.to_global(batch, made.mesh))
        found.append(float(metrics["loss"].compute()))
      return found

  first = draw(1)
  assert len(set(first)) == 3
  assert draw(1) == first
  assert draw(2) != first


def play(num_steps, **kwargs):
  task, batch = toy.Game(**kwargs), toy.batches(1)[0]
  sgd = {"name": "sgd", "learning_rate": 0.25}
  made = program(task, batch, optimizer={"critic": sgd, "actor": sgd}, accumulation_steps=2)
  with jax.set_mesh(made.mesh):
    state, history = made.initial_state(seed=0), []
    for _ in range(num_steps):
      state, metrics = made.train_step(state, sharding.to_global(batch, made.mesh))
      at = {name: float(params["at"]) for name, params in state.params.items()}
      history.append((at, {k: float(m.count) for k, m in metrics.items()}))
  return history


def test_players_move_in_turn_each_in_its_own_parameters():
  # The critic halves its distance to 3 twice in each step; then the actor moves half-way to it.
  (first, counts), (second, _) = play(2)
  assert first == {"critic": 2.25, "actor": 1.125}
  assert second == {"critic": pytest.approx(2.8125), "actor": pytest.approx(1.96875)}
  assert counts["critic_loss"] == 2  # one for each micro-batch of its last move
  assert {"critic_gradient_norm", "actor_gradient_norm"} <= counts.keys()


def test_a_player_stands_still_until_its_turn_begins():
  history = play(3, actor_begins=2)
  assert [at["actor"] for at, _ in history[:2]] == [0.0, 0.0]
  assert history[2][0]["actor"] > 0
  assert history[0][1]["actor_loss"] == 0  # it counted nothing, so nothing is logged of it
  assert history[2][1]["actor_loss"] == 2


def test_frozen_parameters_stay_bit_identical():
  rules = [("wide/.*", {"frozen": True})]
  _, state = losses(toy.Regression(), 3, optimizer=ADAMW | {"rules": rules})
  data = toy.batches(1)[0]
  made = program(toy.Regression(), data)
  with jax.set_mesh(made.mesh):
    fresh = toy.host(made.initial_state(seed=0))
  jax.tree.map(np.testing.assert_array_equal, state.params["wide"], fresh.params["wide"])
  assert np.any(state.params["head"]["kernel"] != fresh.params["head"]["kernel"])


def test_a_batch_that_does_not_fit_is_one_line():
  with pytest.raises(ValueError, match="batch_size 16 cannot be split evenly"):
    program(toy.Regression(), toy.batches(1)[0], accumulation_steps=3)
