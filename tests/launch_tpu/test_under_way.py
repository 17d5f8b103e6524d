"""What is under way, or was there before, is followed and not disturbed."""

import os
import signal

import pytest

from tests.launch_tpu.slice import MAIN, PLACE, TRICKY


def test_run_that_is_running_is_left_alone(tpu):
  tpu.set(request="ACTIVE", behaviours="hold")
  assert tpu.launch("setup", *PLACE).returncode == 0
  assert tpu.launch("run", *PLACE, "--", *MAIN).returncode == 0
  tpu.wait_for_run()
  again = tpu.launch("run", *PLACE, "--", *MAIN)
  assert again.stdout.count("already running") == 2
  assert len(tpu.runs()) == 2
  assert tpu.launch("status", *PLACE).stdout.count("status=running") == 2


@pytest.mark.parametrize(
  ("number", "code", "exists"), [(signal.SIGINT, 130, False), (signal.SIGHUP, 129, True)]
)
def test_interrupt_deletes_and_hang_up_does_not(tpu, number, code, exists):
  tpu.set(behaviours="hold")
  process = tpu.start("all", *PLACE, "--", *MAIN)
  tpu.wait_for_run()
  tpu.wait_until(tpu.followers)
  os.killpg(process.pid, number)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == code, stderr
  assert tpu.exists == exists


@pytest.fixture
def left_alone(tpu):
  """A run on a slice that `all` created, and whose terminal was closed."""
  tpu.set(behaviours="hold")
  process = tpu.start("all", *PLACE, "--", *TRICKY)
  tpu.wait_for_run()
  tpu.wait_until(tpu.followers)
  os.killpg(process.pid, signal.SIGHUP)
  process.communicate(timeout=60)
  return tpu


@pytest.mark.parametrize(("options", "exists"), [([], True), (["--delete"], False)])
def test_all_again_follows_what_is_under_way(left_alone, options, exists):
  tpu, before = left_alone, left_alone.followers()
  process = tpu.start("all", *PLACE, *options, "--", *TRICKY)
  tpu.wait_until(lambda: tpu.followers() > before)
  tpu.set(release="")
  stdout, stderr = process.communicate(timeout=60)
  assert process.returncode == 0, stderr
  assert "the run is under way on vit already" in stderr
  assert "worker0: done" in stdout
  assert len(tpu.runs()) == 2
  assert len(tpu.calls("scp")) == len(tpu.calls("create")) == 1, "nothing is installed over a run"
  assert tpu.exists == exists
  assert ("vit stays; delete it with: " in stderr) == exists


def test_an_interrupt_of_who_only_follows_ends_nothing(left_alone):
  tpu, before = left_alone, left_alone.followers()
  process = tpu.start("all", *PLACE, "--", *TRICKY)
  tpu.wait_until(lambda: tpu.followers() > before)
  os.killpg(process.pid, signal.SIGINT)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 130, stderr
  assert tpu.launch("status", *PLACE).stdout.count("status=running") == 2


def test_another_run_that_is_under_way_is_left_alone(left_alone):
  tpu = left_alone
  result = tpu.launch("all", *PLACE, "--", *MAIN)
  assert result.returncode == 1
  assert "a run with other arguments is under way on vit: 'follow' it, or" in result.stderr
  assert len(tpu.runs()) == 2
  assert len(tpu.calls("scp")) == 1
  assert tpu.exists


def test_a_slice_that_was_there_is_used_and_stays(tpu):
  tpu.set(request="ACTIVE", refused=2)
  result = tpu.launch("all", *PLACE, "--", *MAIN)
  assert result.returncode == 0, result.stderr
  assert len(tpu.runs()) == 2
  assert tpu.exists
  assert "vit stays; delete it with: " in result.stderr
  assert tpu.launch("all", *PLACE, "--delete", "--", *MAIN).returncode == 0
  assert len(tpu.runs()) == 4, "a run that has ended is no obstacle"
  assert not tpu.exists


def test_what_a_silent_slice_does_is_not_guessed(tpu):
  tpu.set(request="ACTIVE", refused=99)
  result = tpu.launch("all", *PLACE, "--", *MAIN)
  assert result.returncode == 1
  assert "whether a run is under way on vit cannot be told" in result.stderr
  assert not tpu.calls("scp")
  assert tpu.exists


def test_a_slice_in_place_of_a_lost_one_is_ones_own(tpu):
  tpu.set(request="SUSPENDED")
  result = tpu.launch("all", *PLACE, "--", *MAIN)
  assert result.returncode == 0, result.stderr
  assert len(tpu.calls("create")) == 1
  assert not tpu.exists


def test_a_slice_of_somebody_who_was_faster_stays(tpu):
  tpu.set(faster_others=1)
  result = tpu.launch("all", *PLACE, "--", *MAIN)
  assert result.returncode == 1
  assert "ALREADY_EXISTS" in result.stderr
  assert tpu.exists
