"""A ViT trains and scores equally on every mesh; shardings of the published models."""

import functools

import jax
import numpy as np
import pytest

from tests.conftest import system_module
from tests.trees import flatten_paths
from vit_jax_zoo import create_model, registry, trainer
from vit_jax_zoo.config import load
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.evaluate import score_predictions

system_module("vit")

pytestmark = pytest.mark.multidevice

NUM_STEPS = 4


def small_config(**mesh):
  config = load("configs/vit.py:demo,batch_size=16")
  config.model.update(width=16, depth=2, mlp_dim=32, num_heads=2)
  config.data.eval.test.split = "test[:20]"  # 16 + 4: the second batch is mostly padding
  config.sharding.mesh.update(mesh)
  config.ema_decay = 0.9
  return config


def train(config, num_devices):
  """Trains a few steps on `num_devices` devices; returns losses, scores and parameters."""
  made = trainer.build(config, jax.devices()[:num_devices])
  batches, losses = made.train_batches(), []
  with jax.set_mesh(made.mesh):
    program = made.program(next(made.train_batches()))
    state = program.initial_state(config.seed)
    for _ in range(NUM_STEPS):
      state, metrics = program.train_step(state, sharding.to_global(next(batches), made.mesh))
      losses.append(float(metrics["loss"].compute()))
    test = functools.partial(made.eval_batches, "test")
    report = score_predictions(state.variables, program=program, batches=test, name="test")
  return np.array(losses), report.scores, jax.tree.map(np.asarray, state.params)


@functools.cache
def on_one_device():
  return train(small_config(data=1), 1)


@pytest.mark.long
@pytest.mark.parametrize(
  ("num_devices", "mesh"),
  [
    pytest.param(2, {"data": 2}, marks=pytest.mark.slow),
    pytest.param(4, {"data": 1, "fsdp": 4}, marks=pytest.mark.slow),
    (8, {"data": 2, "fsdp": 2, "model": 2}),
    pytest.param(8, {"data": 8}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_training_and_scores_equal_on_every_mesh(num_devices, mesh):
  losses, scores, params = train(small_config(**mesh), num_devices)
  expected_losses, expected_scores, expected_params = on_one_device()
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
  assert scores["images"] == 20
  assert scores["accuracy"] == expected_scores["accuracy"]
  assert scores["loss"] == pytest.approx(expected_scores["loss"], rel=1e-5)
  np.testing.assert_allclose(
    params["head"]["kernel"], expected_params["head"]["kernel"], rtol=1e-3, atol=1e-5
  )


def layout(name):
  """Returns each parameter's spec on a mesh of 2 x 2 x 2, by path."""
  mesh = sharding.create_mesh({"data": 2, "fsdp": 2, "model": 2})
  model = create_model(name)
  images = jax.ShapeDtypeStruct((8, 224, 224, 3), np.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  specs = sharding.parameter_specs(params, registry.sharding_rules(name), mesh)
  return {path: str(spec) for path, spec in flatten_paths(specs).items()}


@pytest.mark.parametrize("name", ["vit_b16", "vit_r50_b16", "lambda_resnet_50"])
def test_shardings_golden(name, golden_json):
  golden_json(f"shardings/{name}", layout(name))


def test_large_model_sharded_evenly():
  """With fsdp over 8 devices, no device has more than a seventh of ViT-L."""
  mesh = sharding.create_mesh({"data": 1, "fsdp": 8})
  params = jax.eval_shape(
    create_model("vit_l16").init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((8, 224, 224, 3), np.float32),
  )["params"]
  specs = sharding.parameter_specs(params, registry.sharding_rules("vit_l16"), mesh)
  shardings = sharding.named_shardings(specs, mesh)
  held = jax.tree.map(lambda p, s: np.prod(s.shard_shape(p.shape)), params, shardings)
  whole = sum(p.size for p in jax.tree.leaves(params))
  assert sum(jax.tree.leaves(held)) < whole / 7
