"""The training step: equal on any mesh and with any number of micro-batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.training import toy
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.train_step import TrainingOptions, abstract_batch_of, build_program

ADAMW = {"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1, "clip_norm": 1.0}


def program(task, batch, *, mesh=None, optimizer=None, **kwargs):
  return build_program(
    task,
    abstract_batch_of(batch, len(batch["x"])),
    TrainingOptions(optimizer or ADAMW, num_steps=100, **kwargs),
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
    {"data": 2, "fsdp": 2, "model": 2},
    pytest.param({"data": 1, "fsdp": -1}, marks=pytest.mark.long),
    pytest.param({"data": 1, "model": -1}, marks=pytest.mark.long),
  ],
  ids=str,
)
def test_losses_equal_on_every_mesh(mesh):
  expected, state = one_device_losses()
  found, sharded = losses(toy.Regression(), 6, ema_decay=0.9, mesh=mesh)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  # Includes BatchNorm's statistics, which are those of the whole batch on every mesh.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
    (sharded.model_state, sharded.ema),
    (state.model_state, state.ema),
  )


@functools.cache
def large_batch_losses():
  return losses(toy.Regression(toy.ToyNet(batch_norm=False)), 4)


@pytest.mark.multidevice
@pytest.mark.parametrize("mesh", [None, {"data": -1}], ids=str)
def test_accumulation_equals_large_batch(mesh):
  task = toy.Regression(toy.ToyNet(batch_norm=False))
  expected, state = large_batch_losses()
  found, accumulated = losses(task, 4, mesh=mesh, accumulation_steps=2)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    accumulated.params,
    state.params,
  )


def test_loss_decreases_ema_lags():
  found, state = losses(toy.Regression(), 40, ema_decay=0.99)
  assert found[-5:].mean() < 0.5 * found[:5].mean()
  for latest, averaged in (
    (state.params["wide"]["kernel"], state.ema["params"]["wide"]["kernel"]),
    (state.model_state["batch_stats"]["norm"]["var"], state.ema["batch_stats"]["norm"]["var"]),
  ):
    assert np.abs(latest - averaged).max() > 1e-3
  assert state.variables is state.ema
  assert state.latest_variables.keys() == state.ema.keys() == {"params", "batch_stats"}


def test_ema_of_parameters_and_batch_stats():
  decay, data = 0.75, toy.batches(3)
  made = program(toy.Regression(), data[0], ema_decay=decay)
  with jax.set_mesh(made.mesh):
    state = made.initial_state(seed=0)
    expected = toy.host(state.latest_variables)
    jax.tree.map(np.testing.assert_array_equal, toy.host(state.ema), expected)
    for batch in data:
      state, _ = made.train_step(state, sharding.to_global(batch, made.mesh))
      latest = toy.host(state.latest_variables)
      expected = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, expected, latest)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    toy.host(state.ema),
    expected,
  )


ODD = np.array([0.1, -0.0, np.inf, -np.inf, 1e-40, 3e38, np.nan], np.float32)
"""Values that rounding, or the difference from themselves, would change."""


class WithConstants(toy.Regression):
  """Adds constant collections and a step counter."""

  def init(self, rng, batch):
    constants = {"odd": jnp.asarray(ODD), "small": jnp.asarray([0.3], jnp.bfloat16)}
    return {**super().init(rng, batch), "constants": constants, "steps": {"n": jnp.int32(0)}}

  def loss(self, variables, batch, context):
    own = {key: variables[key] for key in ("params", "batch_stats")}
    output = super().loss(own, batch, context)
    kept = {"constants": variables["constants"], "steps": {"n": variables["steps"]["n"] + 1}}
    return dataclasses.replace(output, model_state={**output.model_state, **kept})


def test_ema_keeps_constants_bitwise_counters_latest():
  _, state = losses(WithConstants(), 5, ema_decay=0.9)
  assert state.ema["constants"]["odd"].tobytes() == ODD.tobytes()
  small = state.ema["constants"]["small"]
  assert small.tobytes() == np.asarray([0.3], small.dtype).tobytes()
  assert state.ema["steps"]["n"] == 5


@pytest.mark.multidevice
@pytest.mark.parametrize("with_ema", [True, False])
def test_pretrained_variables_cast_and_sharded(with_ema):
  batch = toy.batches(1)[0]
  made = program(
    toy.Regression(),
    batch,
    mesh={"data": 2, "fsdp": 2, "model": 2},
    ema_decay=0.9 if with_ema else None,
  )
  kernel = np.arange(256, dtype=np.float64).reshape(8, 32)
  head = jnp.full((32, 1), 0.5)
  given = kernel.copy()

  def pretrain(fresh):
    params = {
      **fresh["params"],
      "wide": {"kernel": given},
      "head": {**fresh["params"]["head"], "kernel": head},
    }
    return {**fresh, "params": params}

  with jax.set_mesh(made.mesh):
    state = made.initial_state(seed=0, pretrain=pretrain)
    jax.tree.map(
      lambda leaf, expected: np.testing.assert_equal(
        (leaf.dtype, leaf.sharding), (expected.dtype, expected.sharding)
      ),
      state,
      made.abstract_state,
    )
    np.testing.assert_array_equal(state.params["wide"]["kernel"], kernel)
    np.testing.assert_array_equal(
      state.variables["params"]["head"]["kernel"], np.full((32, 1), 0.5)
    )
    made.train_step(state, sharding.to_global(batch, made.mesh))
  np.testing.assert_array_equal(given, kernel)
  np.testing.assert_array_equal(head, np.full((32, 1), 0.5))


def test_pretrained_shape_mismatch_raises():
  made = program(toy.Regression(), toy.batches(1)[0])
  wrong = {"kernel": np.zeros((8, 31))}
  with (
    jax.set_mesh(made.mesh),
    pytest.raises(ValueError, match=r"shape \(8, 31\); expected \(8, 32\)"),
  ):
    made.initial_state(0, lambda fresh: {**fresh, "params": {**fresh["params"], "wide": wrong}})


def test_dropout_random_per_step_reproducible_by_seed():
  task = toy.Regression(toy.ToyNet(dropout_rate=0.5, batch_norm=False))
  frozen = {"name": "sgd", "learning_rate": 0.0}
  batch = toy.batches(1)[0]
  made = program(task, batch, optimizer=frozen)

  def losses_of_seed(seed):
    with jax.set_mesh(made.mesh):
      state, found = made.initial_state(seed=0), []
      state = state.replace(rng=jax.random.key_data(jax.random.key(seed)))
      for _ in range(3):
        state, metrics = made.train_step(state, sharding.to_global(batch, made.mesh))
        found.append(float(metrics["loss"].compute()))
      return found

  first = losses_of_seed(1)
  assert len(set(first)) == 3
  assert losses_of_seed(1) == first
  assert losses_of_seed(2) != first


def test_frozen_parameters_bit_identical():
  rules = [("wide/.*", {"frozen": True})]
  _, state = losses(toy.Regression(), 3, optimizer=ADAMW | {"rules": rules})
  data = toy.batches(1)[0]
  made = program(toy.Regression(), data)
  with jax.set_mesh(made.mesh):
    fresh = toy.host(made.initial_state(seed=0))
  jax.tree.map(np.testing.assert_array_equal, state.params["wide"], fresh.params["wide"])
  assert np.any(state.params["head"]["kernel"] != fresh.params["head"]["kernel"])


def test_accumulation_not_divisible_raises():
  with pytest.raises(ValueError, match="batch_size: 16"):
    program(toy.Regression(), toy.batches(1)[0], accumulation_steps=3)


class DenseNet(nn.Module):
  dtype: str

  @nn.compact
  def __call__(self, x, *, train=False):
    return nn.Dense(1, dtype=self.dtype, name="head")(x)[:, 0].astype(jnp.float32)


def test_bfloat16_gradients_accumulated_in_float32():
  batch = {"x": np.ones((256, 8), np.float32), "y": np.full(256, 3.0, np.float32)}
  updates = []
  for dtype, steps in (("float32", 1), ("bfloat16", 256)):
    made = program(
      toy.Regression(model=DenseNet(dtype)),
      batch,
      optimizer={"name": "sgd", "learning_rate": 1.0},
      accumulation_steps=steps,
    )
    with jax.set_mesh(made.mesh):
      state = made.initial_state(seed=0)
      before = toy.host(state.params)
      state, _ = made.train_step(state, sharding.to_global(batch, made.mesh))
    updates.append(jax.tree.map(np.subtract, toy.host(state.params), before))
  for one, many in zip(*map(jax.tree.leaves, updates), strict=True):
    np.testing.assert_allclose(many, one, rtol=0.03)
