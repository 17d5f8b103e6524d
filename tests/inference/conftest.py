"""Short runs, shared by the tests of `predict` and `export`."""

import fcntl
import functools
import os

import jax
import pytest
from etils import epath

from tests.conftest import system_module
from vit_jax_zoo import trainer
from vit_jax_zoo.builder import build
from vit_jax_zoo.config import load


@pytest.fixture(scope="session")
def vit_run(tmp_path_factory):
  system_module("vit")
  config = load("configs/vit.py:demo,num_steps=3,batch_size=16")
  config.model.update(width=16, depth=2, mlp_dim=16, num_heads=2)
  config.data.eval.test.split = "test[:20]"
  config.log_every = config.eval_every = config.checkpoint.every = 3
  return trained(config, "vit_run", tmp_path_factory)


@pytest.fixture(scope="session")
def igpt_run(tmp_path_factory):
  system_module("igpt")
  config = load("configs/igpt.py:demo,num_steps=2,batch_size=8,num_colors=4")
  config.model.update(width=16, depth=2, num_heads=2)
  config.task.palette_images = 64
  config.data.eval = {"test": {**config.data.eval.test.to_dict(), "split": "test[:8]"}}
  config.eval_batch_size, config.checkpoint.every = 8, 2
  return trained(config, "igpt_run", tmp_path_factory)


def trained(config, name, tmp_path_factory):
  """Returns a run's folder; of several worker processes, the first trains, and the others wait."""
  folder = tmp_path_factory.getbasetemp()
  folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
  with (folder / f"{name}.lock").open("a") as lock, pytest.MonkeyPatch.context() as patch:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not os.path.getsize(lock.name):
      # A program for eight devices compiles for longer.
      patch.setattr(trainer, "build", functools.partial(build, devices=jax.devices()[:1]))
      trainer.run(config, epath.Path(folder / name))
      lock.write("trained")
  return folder / name
