"""Life cycle of a slice: create, set up, run, follow, preempt, delete."""

import os
import signal

import pytest

from tests.launch_tpu.slice import MAIN, PLACE, SLICE, TRICKY


def test_all_calls_in_order_and_arguments_unchanged(tpu):
  result = tpu.launch("all", *SLICE, "--spot", "--project=p", "--", *TRICKY)
  assert result.returncode == 0, result.stderr
  assert [" ".join(c[2:4]) for c in tpu.changes()] == [
    "queued-resources create",
    "tpu-vm scp",
    "tpu-vm ssh",
    "tpu-vm ssh",
    "tpu-vm ssh",
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
  assert sorted(r["worker"] for r in tpu.runs()) == ["worker0", "worker1"]
  assert [r["args"] for r in tpu.runs()] == [["-m", "vit_jax_zoo.main", *TRICKY]] * 2
  assert "worker0, run 1: step 1\nworker0: done\n" in result.stdout
  assert "worker1" not in result.stdout  # only one worker's log is printed


def test_single_steps(tpu):
  for step in (["create", *SLICE], ["setup", *PLACE], ["run", *PLACE, "--", *MAIN]):
    result = tpu.launch(*step)
    assert result.returncode == 0, (step, result.stderr)
  result = tpu.launch("follow", *PLACE)
  assert result.returncode == 0
  assert "worker0: done" in result.stdout
  result = tpu.launch("status", *PLACE)
  assert "READY" in result.stderr
  assert result.stdout.count("status=0\n") == 2
  assert "worker1: done" in result.stdout
  assert tpu.exists
  assert tpu.launch("delete", *PLACE).returncode == 0
  assert not tpu.exists


@pytest.mark.parametrize(
  ("kind", "image"),
  [
    ("v4-32", "tpu-ubuntu2204-base"),
    ("v5p-128", "v2-alpha-tpuv5"),
    ("v6e-8", "v2-alpha-tpuv6e"),
    ("v5e-8", "v2-alpha-tpuv5-lite"),
  ],
)
def test_runtime_version_by_type(tpu, kind, image):
  assert tpu.launch("create", *PLACE, f"--type={kind}").returncode == 0
  assert f"--runtime-version={image}" in tpu.calls("create")[0]


def test_runtime_version_flag(tpu):
  assert tpu.launch("create", *SLICE, "--version=v3-beta").returncode == 0
  assert "--runtime-version=v3-beta" in tpu.calls("create")[0]


def test_existing_slice_not_created(tpu):
  tpu.set(request="ACTIVE")
  assert tpu.launch("create", *SLICE).returncode == 0
  assert not tpu.changes()


def test_create_waits_in_queue(tpu):
  tpu.set(next_states="WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
  result = tpu.launch("create", *SLICE)
  assert result.returncode == 0
  words = result.stderr.split()
  states = [w for w in words if w in {"WAITING_FOR_RESOURCES", "PROVISIONING", "READY"}]
  assert states == ["WAITING_FOR_RESOURCES", "PROVISIONING", "READY"]


def test_create_waits_for_ssh(tpu):
  tpu.set(refused=3)
  assert tpu.launch("create", *SLICE).returncode == 0
  assert len(tpu.calls("ssh")) == 4


def test_create_replaces_preempted_slice(tpu):
  tpu.set(request="SUSPENDED")
  assert tpu.launch("create", *SLICE).returncode == 0
  assert len(tpu.calls("delete")) == len(tpu.calls("create")) == 1


@pytest.mark.parametrize(("how", "failed_queries"), [("preempted", 0), ("suspended", 3)])
def test_preempted_run_resumes_on_new_slice(tpu, how, failed_queries):
  tpu.set(behaviours=f"{how} ok")
  if failed_queries:
    tpu.set(broken_after_preemption=failed_queries)
  result = tpu.launch("all", *SLICE, "--spot", "--", *MAIN)
  assert result.returncode == 0, result.stderr
  assert len(tpu.calls("create")) == len(tpu.calls("delete")) == 2
  assert {tuple(r["args"][2:]) for r in tpu.runs()} == {tuple(MAIN)}
  assert "worker0, run 2: step 1\nworker0: done\n" in result.stdout
  assert not tpu.exists


def test_terminated_run_resumes_on_same_slice(tpu):
  tpu.set(behaviours="terminated ok")
  result = tpu.launch("all", *SLICE, "--", *MAIN)
  assert result.returncode == 0, result.stderr
  assert len(tpu.calls("create")) == len(tpu.calls("delete")) == 1
  assert len(tpu.runs()) == 4


def test_slice_in_unknown_state_not_deleted(tpu):
  tpu.set(behaviours="suspended", broken_after_preemption=99)
  result = tpu.launch("all", *SLICE, "--spot", "--", *MAIN)
  assert result.returncode == 1
  assert tpu.exists
  assert not tpu.calls("delete")
  assert "delete --name=vit --zone=us-central2-b" in result.stderr


def test_retries_exceeded(tpu):
  tpu.set(behaviours="suspended")
  result = tpu.launch("all", *SLICE, "--retries=1", "--", *MAIN)
  assert result.returncode == 1
  assert len(tpu.calls("create")) == 2
  assert not tpu.exists


def test_follow_reports_preemption(tpu):
  tpu.set(request="SUSPENDED")
  result = tpu.launch("follow", *PLACE)
  assert result.returncode != 0
  assert "PREEMPTED" in result.stderr


def test_failed_run_prints_logs_and_deletes(tpu):
  tpu.set(behaviours="fail")
  result = tpu.launch("all", *SLICE, "--", *MAIN)
  assert result.returncode == 1
  assert "exit status by worker 0 1" in result.stderr
  assert "ValueError: the batch does not fit" in result.stdout
  assert not tpu.exists
  assert len(tpu.calls("create")) == 1


def test_keep_flag_keeps_slice(tpu):
  tpu.set(behaviours="fail")
  result = tpu.launch("all", *SLICE, "--keep", "--", *MAIN)
  assert result.returncode == 1
  assert tpu.exists
  assert "delete --name=vit --zone=us-central2-b" in result.stderr


def test_failed_request_deleted(tpu):
  tpu.set(next_states="FAILED")
  result = tpu.launch("all", *SLICE, "--", *MAIN)
  assert result.returncode == 1
  assert "FAILED" in result.stderr
  assert len(tpu.calls("create")) == 1
  assert not tpu.exists


def test_gcloud_not_logged_in(tpu):
  tpu.set(broken_lists=99)
  result = tpu.launch("create", *SLICE)
  assert result.returncode == 1
  assert "gcloud auth login" in result.stderr
  assert not tpu.calls("create")


def test_dropped_connections_do_not_stop_run(tpu):
  tpu.set(behaviours="hold", dropped_connections=3)
  process = tpu.start("all", *SLICE, "--", *MAIN)
  tpu.wait_until(lambda: tpu.followers() > 3)
  tpu.set(broken_lists=2, release="")
  stdout, stderr = process.communicate(timeout=60)
  assert process.returncode == 0, stderr
  assert "worker0: done" in stdout
  assert len(tpu.runs()) == 2


def test_delete_missing_slice_is_no_error(tpu):
  assert tpu.launch("delete", *PLACE).returncode == 0
  assert not tpu.changes()


def test_concurrent_setups_succeed(tpu):
  tpu.set(request="ACTIVE")
  setups = [tpu.start("setup", *PLACE) for _ in range(2)]
  errors = [setup.communicate(timeout=60)[1] for setup in setups]
  assert [setup.returncode for setup in setups] == [0, 0], errors
  assert len({call[4] for call in tpu.calls("scp")}) == 2, "each has its own archive"
  assert not list(tpu.state.glob("*.tar.gz"))


@pytest.mark.parametrize(
  ("number", "code", "exists"),
  [(signal.SIGINT, 130, False), (signal.SIGTERM, 143, False), (signal.SIGHUP, 129, True)],
)
def test_interrupt_deletes_hangup_does_not(tpu, number, code, exists):
  tpu.set(behaviours="hold")
  process = tpu.start("all", *SLICE, "--", *MAIN)
  tpu.wait_for_run()
  tpu.wait_until(tpu.followers)
  os.killpg(process.pid, number)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode in {code, -number}, stderr
  assert tpu.exists == exists


def test_terminated_script_deletes(tpu):
  tpu.set(behaviours="hold")
  process = tpu.start("all", *SLICE, "--", *MAIN)
  tpu.wait_for_run()
  tpu.wait_until(tpu.followers)
  process.terminate()
  tpu.wait_until(lambda: not tpu.exists)
  process.communicate(timeout=60)
  assert process.returncode != 0
