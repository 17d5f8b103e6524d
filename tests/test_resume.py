"""A run that is interrupted or killed, then resumed, is bit-exact."""

import random
import signal
import time

import jax
import numpy as np
import pytest

from tests import command
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


def signal_once_it_trains(workdir, number, delay=0.0):
  """Signals a run `delay` seconds after its first new step; returns its exit code."""
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
