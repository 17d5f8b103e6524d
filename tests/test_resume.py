"""A run that is interrupted or killed, then resumed, is bit-exact."""

import random
import signal
import time

import jax
import numpy as np
import pytest

from tests import command
from tests.conftest import system_module
from vit_jax_zoo.training.checkpoint import find_checkpoint, restore_variables

NUM_STEPS = 100  # a signal at the second step arrives before the last step, on any machine
RUN = (
  *command.TINY,
  f"--config.num_steps={NUM_STEPS}",
  f"--config.eval_every={NUM_STEPS // 2}",
  "--config.checkpoint.every=10",
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
  return workdir, command.run(workdir, *RUN)


def signal_once_it_trains(workdir, number, delay=0.0, run=RUN):
  """Signals a run `delay` seconds after its first new step; returns its exit code."""
  log = workdir / "metrics.jsonl"
  before = log.stat().st_size if log.exists() else 0
  process = command.start(workdir, *run)
  deadline = time.monotonic() + 200
  while process.poll() is None and time.monotonic() < deadline:
    if log.exists() and log.stat().st_size != before:
      break
    time.sleep(0.002)
  time.sleep(delay)
  process.send_signal(number)
  process.communicate(timeout=100)
  return process.returncode


def kill_at_random(workdir, seed, longest=0.2, run=RUN):
  delay = random.Random(seed).uniform(0, longest)
  return signal_once_it_trains(workdir, signal.SIGKILL, delay, run)


def assert_same_run(workdir, other, num_steps=NUM_STEPS):
  found, expected = (find_checkpoint(run / "checkpoints") for run in (workdir, other))
  assert found.name == expected.name == str(num_steps)
  jax.tree.map(np.testing.assert_array_equal, restore_variables(found), restore_variables(expected))
  assert command.rows(workdir) == command.rows(other)


@pytest.mark.long
def test_interrupted_killed_resumed(uninterrupted, tmp_path):
  workdir = tmp_path / "run"
  assert signal_once_it_trains(workdir, signal.SIGTERM) == 143
  saved = int(find_checkpoint(workdir / "checkpoints").name)
  assert 2 <= saved < NUM_STEPS
  logged = command.rows(workdir)[-1]["step"]
  assert saved - 2 < logged <= saved  # schedule rows only
  assert kill_at_random(workdir, seed=1) == -signal.SIGKILL
  last = find_checkpoint(workdir / "checkpoints").name
  output = command.run(workdir, *RUN)
  assert f"resumed at step {last} " in output
  assert f"done after {NUM_STEPS} steps: test/accuracy" in output
  assert_same_run(workdir, uninterrupted[0])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 20, 4))
def test_killed_many_times(uninterrupted, tmp_path, first):
  codes = [kill_at_random(tmp_path / "run", seed) for seed in range(first, first + 4)]
  assert -signal.SIGKILL in codes, "every signal arrived after the last step"
  command.run(tmp_path / "run", *RUN)
  assert_same_run(tmp_path / "run", uninterrupted[0])


# A small discriminator: from `begin_step` on, its gradients are computed within a conditional,
# where XLA's convolutions take a minute on CPUs.
TWO_OPTIMIZERS = """
from configs import ttsr
from vit_jax_zoo.systems.ttsr import losses, task

task.SuperResolution._discriminator = losses.Discriminator((4, 4), 8)

def get_config(arg=""):
  config = ttsr.demo(num_steps=30, batch_size=2)
  config.model.update(width=4, depths=(1, 1, 1, 1), texture_widths=(4, 4, 4))
  config.task.update(adversarial_weight=1e-3, begin_step=4, discriminator_updates=2)
  config.optimizer.discriminator = {"name": "adam", "learning_rate": 1e-4}
  return config
"""
SMALL_DETR = (
  "--config=configs/detr.py:demo,num_steps=30,batch_size=8",
  "--config.model.width=16",
  "--config.model.num_heads=2",
  "--config.model.mlp_dim=16",
  "--config.model.backbone.widths=(4, 4, 4, 4)",
  "--config.model.backbone.stem_width=4",
  "--config.eval_batch_size=8",
  "--config.data.eval.test.split=test[:8]",
)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["detr", "ttsr"])
def test_killed_run_with_matching_or_two_optimizers(tmp_path, system):
  system_module(system)
  (tmp_path / "own").mkdir()
  (tmp_path / "own" / "gan.py").write_text(TWO_OPTIMIZERS)
  config = SMALL_DETR if system == "detr" else (f"--config={tmp_path}/own/gan.py",)
  every = ("--config.log_every=1", "--config.checkpoint.every=4", "--config.eval_every=15")
  run = (*config, *every, "--config.explain=False")
  command.run(tmp_path / "undisturbed", *run)
  workdir = tmp_path / "killed"
  assert signal_once_it_trains(workdir, signal.SIGTERM, run=run) == 143
  for seed in range(2):
    assert kill_at_random(workdir, seed, longest=2, run=run) == -signal.SIGKILL
  assert "resumed at step" in command.run(workdir, *run)
  assert_same_run(workdir, tmp_path / "undisturbed", 30)


@pytest.mark.long  # test_trainer.py has the lines of `main` without the process
def test_last_lines_list_scores_and_outputs(uninterrupted):
  workdir, output = uninterrupted
  assert "test/accuracy" in output
  assert "ETA" in output
  for place in ("checkpoints", "metrics.jsonl", "figures"):
    assert str(workdir / place) in output
    assert (workdir / place).exists()
  assert f"tensorboard --logdir={workdir}" in output
  assert list((workdir / "figures").glob("train_batch_*.png"))
  assert list((workdir / "figures").glob("test_predictions_*.png"))
