"""Checkpoints saved on one mesh and restored on another: bit-exact, same next step."""

import jax
import numpy as np
import pytest

from vit_jax_zoo import trainer
from vit_jax_zoo.config import load
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.checkpoint import Checkpointer

pytestmark = pytest.mark.multidevice

SLOW = pytest.mark.slow  # tracing the larger ones five times is slow
SYSTEMS = ("vit", "igpt", "lambda_resnet", "detr", "ttsr", "fpt")
ONE = {"data": 1}
MESHES = (ONE, {"data": 2, "fsdp": 2, "model": 2}, {"data": 1, "fsdp": 8}, ONE)
"""From one device to two meshes of eight, and back."""


def experiment_on(system, mesh):
  config = load(f"configs/{system}.py:demo,batch_size=8")
  config.accumulation_steps = 1
  config.sharding.mesh.update({"data": 1, "fsdp": 1, "model": 1, **mesh})
  return trainer.build(config, jax.devices()[: int(np.prod(list(mesh.values())))])


def program_of(made):
  with jax.set_mesh(made.mesh):
    return made.program(next(made.train_batches()))


def random_array(leaf, rng):
  if leaf.dtype == bool:
    return rng.integers(0, 2, leaf.shape).astype(bool)
  if np.issubdtype(leaf.dtype, np.integer):
    return rng.integers(0, 100, leaf.shape).astype(leaf.dtype)
  return rng.standard_normal(leaf.shape).astype(leaf.dtype)


def restore(workdir, program):
  with Checkpointer(workdir) as checkpointer:
    return checkpointer.restore(program.abstract_state)


def save(workdir, state):
  with Checkpointer(workdir) as checkpointer:
    checkpointer.save(1, state)


@pytest.mark.long
@pytest.mark.parametrize(
  "system",
  [system if system == "vit" else pytest.param(system, marks=SLOW) for system in SYSTEMS],
)
def test_arrays_restored_on_every_mesh(system, tmp_path):
  rng = np.random.default_rng(0)
  expected, split = None, 0
  programs = [program_of(experiment_on(system, mesh)) for mesh in MESHES[:-1]]
  for i, program in enumerate([*programs, programs[0]]):
    if expected is None:
      expected = jax.tree.map(lambda leaf: random_array(leaf, rng), program.abstract_state)
      places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
      state = jax.device_put(expected, places)
    else:
      state = restore(tmp_path / str(i - 1), program)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    for leaf, expected_leaf in zip(
      jax.tree.leaves(state), jax.tree.leaves(program.abstract_state), strict=True
    ):
      assert leaf.sharding.is_equivalent_to(expected_leaf.sharding, leaf.ndim)
      split += not leaf.sharding.is_fully_replicated
    save(tmp_path / str(i), state)
  assert split, "no mesh shards any array"


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_step_after_restore_on_other_mesh(system, tmp_path):
  losses = []
  for mesh in (ONE, {"data": 2, "fsdp": 2, "model": 2}):
    made = experiment_on(system, mesh)
    batches = made.train_batches()
    with jax.set_mesh(made.mesh):
      program = made.program(next(made.train_batches()))
      first = sharding.to_global(next(batches), made.mesh)
      if mesh == ONE:
        state, _ = program.train_step(program.initial_state(0), first)
        save(tmp_path, state)
      state = restore(tmp_path, program)
      _, metrics = program.train_step(state, sharding.to_global(next(batches), made.mesh))
    losses.append({name: float(mean.compute()) for name, mean in metrics.items()})
  assert losses[1] == pytest.approx(losses[0], rel=2e-4, abs=1e-5)
