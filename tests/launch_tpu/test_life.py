"""A slice's whole life: created, set up, run on, followed, preempted, deleted."""

import time

import pytest

from tests.launch_tpu.slice import MAIN, PLACE, TRICKY


def test_whole_life(tpu):
  result = tpu.launch("all", *PLACE, "--spot", "--project=p", "--", *TRICKY)
  assert result.returncode == 0, result.stderr
  verbs = [" ".join(c[2:4]) for c in tpu.calls()]
  steps = [v for i, v in enumerate(verbs) if i == 0 or v != verbs[i - 1]]
  assert steps == [
    "queued-resources describe",
    "queued-resources create",
    "queued-resources describe",
    "tpu-vm describe",
    "tpu-vm scp",
    "tpu-vm ssh",
    "queued-resources describe",
    "tpu-vm describe",
    "tpu-vm ssh",
    "queued-resources describe",
    "queued-resources delete",
  ]
  assert " ".join(tpu.calls("create")[0]) == (
    "compute tpus queued-resources create vit --node-id=vit --quiet --zone=us-central2-b "
    "--project=p --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"
  )
  assert all("--zone=us-central2-b" in c and "--project=p" in c for c in tpu.calls())
  assert "--force" in tpu.calls("delete")[0]
  assert not tpu.exists
  assert not list(tpu.state.glob("*.tar.gz"))


def test_main_gets_its_arguments_unchanged_on_every_worker(tpu):
  result = tpu.launch("all", *PLACE, "--", *TRICKY)
  assert sorted(r["worker"] for r in tpu.runs()) == ["worker0", "worker1"]
  assert [r["args"] for r in tpu.runs()] == [["-m", "vit_jax_zoo.main", *TRICKY]] * 2
  assert "worker0, run 1: step 1\nworker0: done\n" in result.stdout
  assert "worker1" not in result.stdout  # one log is enough to read


def test_steps_one_by_one(tpu):
  for step in (["create"], ["setup"], ["run", "--", *MAIN], ["follow"]):
    result = tpu.launch(step[0], *PLACE, *step[1:])
    assert result.returncode == 0, (step, result.stderr)
  result = tpu.launch("status", *PLACE)
  assert result.stdout.startswith("slice: READY\nstatus=0\n")
  assert tpu.exists
  assert tpu.launch("delete", *PLACE).returncode == 0
  assert not tpu.exists


def test_existing_slice_is_used(tpu):
  tpu.set(request="ACTIVE")
  result = tpu.launch("create", *PLACE)
  assert result.returncode == 0
  assert "exists already (READY)" in result.stderr
  assert not tpu.calls("create")


def test_create_waits_in_the_queue(tpu):
  tpu.set(next_states="WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
  result = tpu.launch("create", *PLACE)
  assert result.returncode == 0
  waits = [line.split(": ")[1] for line in result.stderr.splitlines() if "waiting" in line]
  assert waits == ["WAITING_FOR_RESOURCES", "PROVISIONING"]


def test_create_replaces_what_a_preemption_left(tpu):
  tpu.set(request="SUSPENDED")
  assert tpu.launch("create", *PLACE).returncode == 0
  assert len(tpu.calls("delete")) == len(tpu.calls("create")) == 1


@pytest.mark.parametrize("how", ["suspended", "preempted"])
def test_preempted_run_resumes_on_a_new_slice(tpu, how):
  tpu.set(behaviours=f"{how} ok")
  result = tpu.launch("all", *PLACE, "--spot", "--", *MAIN)
  assert result.returncode == 0, result.stderr
  assert "cut short; resuming it, on a new slice if need be (1 of 20)" in result.stderr
  assert len(tpu.calls("create")) == len(tpu.calls("delete")) == 2
  assert {tuple(r["args"][2:]) for r in tpu.runs()} == {tuple(MAIN)}
  assert "worker0, run 2: step 1\nworker0: done\n" in result.stdout
  assert not tpu.exists


def test_run_that_was_told_to_stop_resumes_on_its_slice(tpu):
  tpu.set(behaviours="terminated ok")
  result = tpu.launch("all", *PLACE, "--", *MAIN)
  assert result.returncode == 0, result.stderr
  assert len(tpu.calls("create")) == len(tpu.calls("delete")) == 1
  assert len(tpu.runs()) == 4


def test_preemptions_without_end(tpu):
  tpu.set(behaviours="suspended")
  result = tpu.launch("all", *PLACE, "--retries=2", "--", *MAIN)
  assert result.returncode == 1
  assert "cut short 3 times; --retries=2 allows no more" in result.stderr
  assert len(tpu.calls("create")) == 3
  assert not tpu.exists


def test_follow_reports_a_preemption(tpu):
  tpu.set(request="SUSPENDED")
  result = tpu.launch("follow", *PLACE)
  assert result.returncode == 75
  assert "resumes it" in result.stderr


def test_failed_run_shows_the_logs_and_deletes(tpu):
  tpu.set(behaviours="fail")
  result = tpu.launch("all", *PLACE, "--", *MAIN)
  assert result.returncode == 1
  assert "the run has failed (exit status by worker: 0 1)" in result.stderr
  assert "ValueError: the batch does not fit" in result.stdout
  assert not tpu.exists
  assert len(tpu.calls("create")) == 1


def test_keep(tpu):
  tpu.set(behaviours="fail")
  result = tpu.launch("all", *PLACE, "--keep", "--", *MAIN)
  assert result.returncode == 1
  assert tpu.exists
  assert "delete --name=vit --zone=us-central2-b" in result.stderr


def test_slice_that_cannot_be_had(tpu):
  tpu.set(next_states="FAILED")
  result = tpu.launch("all", *PLACE, "--", *MAIN)
  assert result.returncode == 1
  assert "vit is FAILED" in result.stderr
  assert len(tpu.calls("create")) == 1
  assert not tpu.exists


def test_gcloud_that_is_not_logged_in(tpu):
  tpu.set(broken_describes=99)
  result = tpu.launch("create", *PLACE)
  assert result.returncode == 1
  assert "cannot describe vit in us-central2-b: ERROR" in result.stderr
  assert len(result.stderr.splitlines()) == 1
  assert not tpu.calls("create")


def test_broken_connections_do_not_end_the_run(tpu):
  tpu.set(behaviours="hold", dropped_connections=3)
  process = tpu.start("all", *PLACE, "--", *MAIN)
  tpu.wait_for_run()
  tpu.set(broken_describes=2)
  time.sleep(0.5)
  tpu.set(release="")
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 0, stderr
  assert stderr.count("no connection to worker 0's log") == 3
  assert len(tpu.runs()) == 2


def test_setup_tries_again(tpu):
  tpu.set(request="ACTIVE", refused=2)
  result = tpu.launch("setup", *PLACE)
  assert result.returncode == 0, result.stderr
  assert "attempt 2 of 3" in result.stderr


def test_deleting_nothing_is_no_error(tpu):
  result = tpu.launch("delete", *PLACE)
  assert result.returncode == 0
  assert "nothing to delete" in result.stderr


def test_two_setups_at_once_get_in_each_others_way_but_both_succeed(tpu):
  tpu.set(request="ACTIVE")
  setups = [tpu.start("setup", *PLACE) for _ in range(2)]
  errors = [setup.communicate(timeout=60)[1] for setup in setups]
  assert [setup.returncode for setup in setups] == [0, 0], errors
  assert len({call[4] for call in tpu.calls("scp")}) == 2, "the first removes what the other copies"
  assert not list(tpu.state.glob("*.tar.gz"))
