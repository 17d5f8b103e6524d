"""A run that is interrupted or killed, and resumed, ends with the bits of an undisturbed run."""

import random
import signal
import time

import jax
import numpy as np
import pytest

from tests import command
from vit_jax_zoo.training.checkpoint import find_checkpoint, restore_variables

NUM_STEPS = 100  # so many that a signal at the second step lands before the last, on any machine
RUN = (
  *command.TINY,
  f"--config.num_steps={NUM_STEPS}",
  f"--config.eval_every={NUM_STEPS // 2}",
  "--config.checkpoint.every=10",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("undisturbed") / "run"
  return workdir, command.run(workdir, *RUN)


def signal_once_it_trains(workdir, number, delay=0.0):
  """Starts the run, signals it `delay` seconds after its first new step; returns the exit code."""
  log = workdir / "metrics.jsonl"
  before = log.stat().st_size if log.exists() else 0
  process = command.start(workdir, *RUN)
  deadline = time.monotonic() + 200
  while process.poll() is None and time.monotonic() < deadline:
    if log.exists() and log.stat().st_size != before:
      break
    time.sleep(0.002)
  time.sleep(delay)
  process.send_signal(number)
  process.communicate(timeout=100)
  return process.returncode


def kill_at_random(workdir, seed):
  return signal_once_it_trains(workdir, signal.SIGKILL, random.Random(seed).uniform(0, 0.2))


def assert_same_run(workdir, other):
  found, expected = (find_checkpoint(run / "checkpoints") for run in (workdir, other))
  assert found.name == expected.name == str(NUM_STEPS)
  jax.tree.map(np.testing.assert_array_equal, restore_variables(found), restore_variables(expected))
  assert command.rows(workdir) == command.rows(other)


def test_interrupted_then_killed_then_resumed(undisturbed, tmp_path):
  workdir = tmp_path / "run"
  assert signal_once_it_trains(workdir, signal.SIGTERM) == 143
  saved = int(find_checkpoint(workdir / "checkpoints").name)
  assert 2 <= saved < NUM_STEPS
  logged = command.rows(workdir)[-1]["step"]
  assert saved - 2 < logged <= saved  # rows of the schedule only
  assert kill_at_random(workdir, seed=1) == -signal.SIGKILL
  last = find_checkpoint(workdir / "checkpoints").name
  output = command.run(workdir, *RUN)
  assert f"resumed at step {last} " in output
  assert f"done after {NUM_STEPS} steps: test/accuracy" in output
  assert_same_run(workdir, undisturbed[0])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 20, 4))
def test_killed_many_times(undisturbed, tmp_path, first):
  codes = [kill_at_random(tmp_path / "run", seed) for seed in range(first, first + 4)]
  assert -signal.SIGKILL in codes, "every kill came after the last step"
  command.run(tmp_path / "run", *RUN)
  assert_same_run(tmp_path / "run", undisturbed[0])


def test_the_last_lines_name_the_scores_and_the_outputs(undisturbed):
  workdir, output = undisturbed
  assert "test/accuracy" in output
  assert "ETA" in output
  for place in ("checkpoints", "metrics.jsonl", "figures"):
    assert str(workdir / place) in output
    assert (workdir / place).exists()
  assert f"tensorboard --logdir={workdir}" in output
  assert list((workdir / "figures").glob("train_batch_*.png"))
  assert list((workdir / "figures").glob("test_predictions_*.png"))
