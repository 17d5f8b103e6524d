"""Running jobs and existing slices are reused and not disturbed."""

import os
import signal

import pytest

from tests.launch_tpu.slice import MAIN, PLACE, SLICE, TRICKY


def test_running_job_not_restarted(tpu):
  tpu.set(request="ACTIVE", behaviours="hold")
  assert tpu.launch("setup", *PLACE).returncode == 0
  assert tpu.launch("run", *PLACE, "--", *MAIN).returncode == 0
  tpu.wait_for_run()
  again = tpu.launch("run", *PLACE, "--", *MAIN)
  assert again.stdout.count("already running") == 2
  assert len(tpu.runs()) == 2
  assert tpu.launch("status", *PLACE).stdout.count("status=running") == 2
  other = tpu.launch("run", *PLACE, "--", *MAIN, "--config.seed=1")
  assert other.returncode != 0
  assert "--config.seed=1" not in other.stdout
  assert other.stdout.count(MAIN[0]) == 2, "the flags of the running job"
  assert len(tpu.runs()) == 2


@pytest.fixture
def hung_up(tpu):
  """A run on a slice created by `all`, after SIGHUP."""
  tpu.set(behaviours="hold")
  process = tpu.start("all", *SLICE, "--", *TRICKY)
  tpu.wait_for_run()
  tpu.wait_until(tpu.followers)
  os.killpg(process.pid, signal.SIGHUP)
  process.communicate(timeout=60)
  return tpu


def test_all_again_follows_running_job(hung_up):
  tpu, before = hung_up, hung_up.followers()
  process = tpu.start("all", *SLICE, "--", *TRICKY)
  tpu.wait_until(lambda: tpu.followers() > before)
  tpu.set(release="")
  stdout, stderr = process.communicate(timeout=60)
  assert process.returncode == 0, stderr
  assert "worker0: done" in stdout
  assert len(tpu.runs()) == 2
  assert len(tpu.calls("scp")) == len(tpu.calls("create")) == 1, "no installation during a run"
  assert tpu.exists, "only the process that created the slice deletes it"
  assert "delete --name=vit --zone=us-central2-b" in stderr


def test_interrupted_follower_does_not_stop_run(hung_up):
  tpu, before = hung_up, hung_up.followers()
  process = tpu.start("all", *SLICE, "--", *TRICKY)
  tpu.wait_until(lambda: tpu.followers() > before)
  os.killpg(process.pid, signal.SIGINT)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 130, stderr
  assert tpu.launch("status", *PLACE).stdout.count("status=running") == 2


def test_other_running_job_raises(hung_up):
  tpu = hung_up
  result = tpu.launch("all", *SLICE, "--", *MAIN)
  assert result.returncode == 1
  assert "other flags" in result.stderr
  assert len(tpu.runs()) == 2
  assert len(tpu.calls("scp")) == 1
  assert tpu.exists


def test_existing_slice_not_deleted(tpu):
  tpu.set(request="ACTIVE", refused=2)
  result = tpu.launch("all", *SLICE, "--", *MAIN)
  assert result.returncode == 0, result.stderr
  assert len(tpu.runs()) == 2
  assert tpu.exists
  assert "delete --name=vit --zone=us-central2-b" in result.stderr
  assert tpu.launch("all", *SLICE, "--", *MAIN).returncode == 0
  assert len(tpu.runs()) == 4, "a finished run does not block the next"
  assert tpu.exists


def test_slice_without_ssh_unchanged(tpu):
  tpu.set(request="ACTIVE", refused=99)
  result = tpu.launch("all", *SLICE, "--", *MAIN)
  assert result.returncode == 1
  assert not tpu.calls("scp")
  assert tpu.exists


def test_unlisted_node_not_deleted(tpu):
  """A list without the node may be incomplete; only the state of the request is reliable."""
  tpu.set(request="ACTIVE", node="missing")
  process = tpu.start("create", *SLICE)
  tpu.wait_until(lambda: len(tpu.calls("list")) > 6)
  tpu.set(node="READY")
  process.communicate(timeout=60)
  assert process.returncode == 0
  assert not tpu.changes()


def test_replacement_of_preempted_slice_deleted(tpu):
  tpu.set(request="SUSPENDED")
  result = tpu.launch("all", *SLICE, "--", *MAIN)
  assert result.returncode == 0, result.stderr
  assert len(tpu.calls("create")) == 1
  assert not tpu.exists


def test_slice_of_other_process_not_deleted(tpu):
  tpu.set(faster_others=1)
  result = tpu.launch("all", *SLICE, "--", *MAIN)
  assert result.returncode == 1
  assert "ALREADY_EXISTS" in result.stderr
  assert tpu.exists
