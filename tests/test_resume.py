"""A run that is killed anywhere ends, after the same command again, with the same bits."""

import os
import random
import signal
import time

import jax
import numpy as np
import pytest

from tests import command
from vit_jax_zoo.training.checkpoint import find_checkpoint, restore_variables


def final_bits(workdir, step=24):
  directory = find_checkpoint(workdir / "checkpoints")
  assert directory.name == str(step)
  return restore_variables(directory)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("undisturbed") / "run"
  output = command.run(workdir, *command.TINY)
  return workdir, output


def kill_once_it_trains(workdir, number, delay=0.0, arguments=command.TINY):
  """Starts the command, and signals `delay` seconds after it trains; returns its exit code."""
  before = (workdir / "metrics.jsonl").stat().st_size if (workdir / "metrics.jsonl").exists() else 0
  process = command.start(workdir, *arguments)
  deadline = time.monotonic() + 200
  while process.poll() is None and time.monotonic() < deadline:
    log = workdir / "metrics.jsonl"
    if log.exists() and log.stat().st_size != before:
      break
    time.sleep(0.002)
  time.sleep(delay)
  process.send_signal(number)
  process.communicate(timeout=100)
  return process.returncode


def assert_same_run(workdir, other):
  jax.tree.map(np.testing.assert_array_equal, final_bits(workdir), final_bits(other))
  assert command.rows(workdir) == command.rows(other)


def drill(workdir, undisturbed, seeds):
  # The remaining steps take about 0.4 s.
  delays = [random.Random(seed).uniform(0, 0.4) for seed in seeds]
  codes = [kill_once_it_trains(workdir, signal.SIGKILL, delay) for delay in delays]
  assert -signal.SIGKILL in codes, "every kill came too late to disturb the run"
  command.run(workdir, *command.TINY)
  assert_same_run(workdir, undisturbed)


def test_killed_at_random_moments(undisturbed, tmp_path):
  drill(tmp_path / "run", undisturbed[0], seeds=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 20, 4))
def test_killed_many_times(undisturbed, tmp_path, first):
  drill(tmp_path / "run", undisturbed[0], seeds=range(first, first + 4))


LONG = (
  *command.TINY,
  "--config.num_steps=400",
  "--config.eval_every=0",
  "--config.checkpoint.every=0",
)
"""So many steps that a signal at the second one lands before the last, on any machine."""


def test_sigterm_saves_and_exits_and_the_same_command_goes_on(tmp_path):
  interrupted, undisturbed = tmp_path / "interrupted", tmp_path / "undisturbed"
  assert kill_once_it_trains(interrupted, signal.SIGTERM, arguments=LONG) == 143
  saved = int(find_checkpoint(interrupted / "checkpoints").name)
  assert 2 <= saved < 400
  logged = command.rows(interrupted)[-1]["step"]
  assert saved - 2 < logged <= saved  # no row but those of the schedule
  output = command.run(interrupted, *LONG)
  assert f"resumed at step {saved} " in output
  assert "done after 400 steps: test/accuracy" in output
  command.run(undisturbed, *LONG)
  jax.tree.map(
    np.testing.assert_array_equal,
    final_bits(interrupted, step=400),
    final_bits(undisturbed, step=400),
  )
  assert command.rows(interrupted) == command.rows(undisturbed)


def test_a_finished_run_is_scored_again_and_changes_nothing(undisturbed):
  workdir, output = undisturbed
  before = (workdir / "metrics.jsonl").read_bytes(), sorted(os.listdir(workdir / "checkpoints"))
  again = command.run(workdir, *command.TINY)
  last = [line.split(maxsplit=1)[1] for line in (output, again) for line in line.splitlines()
          if "done after" in line]  # fmt: skip
  assert len(last) == 2
  assert last[0] == last[1]
  assert before == (
    (workdir / "metrics.jsonl").read_bytes(),
    sorted(os.listdir(workdir / "checkpoints")),
  )


def test_another_config_does_not_silently_take_over_a_run(undisturbed):
  changed = "--config.optimizer.learning_rate=0.5"
  output = command.run(undisturbed[0], *command.TINY, changed, expect=2)
  assert "holds a run of another config (optimizer.learning_rate: 0.003 -> 0.5)" in output
  assert "Traceback" not in output


def test_the_end_says_what_came_out_and_where_it_lies(undisturbed):
  workdir, output = undisturbed
  assert "test/accuracy" in output
  assert "ETA" in output
  for place in ("checkpoints", "metrics.jsonl", "figures"):
    assert str(workdir / place) in output
    assert (workdir / place).exists()
  assert f"tensorboard --logdir={workdir}" in output
  assert list((workdir / "figures").glob("train_batch_*.png"))
  assert list((workdir / "figures").glob("test_predictions_*.png"))
