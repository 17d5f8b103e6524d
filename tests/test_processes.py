"""Several processes on one machine compute the same as one process."""

import signal
import socket
import time

import jax
import numpy as np
import pytest

from tests import command
from vit_jax_zoo.training import distributed
from vit_jax_zoo.training.checkpoint import restore_variables


def free_port():
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    return listener.getsockname()[1]


def start_processes(workdir, count, *arguments, devices_each=1):
  coordinator = f"--coordinator=localhost:{free_port()}"
  return [
    command.start(
      workdir,
      *arguments,
      coordinator,
      f"--num_processes={count}",
      f"--process_id={i}",
      num_devices=devices_each,
      JAX_ENABLE_COMPILATION_CACHE="0",
    )
    for i in range(count)
  ]


def run_processes(workdir, count, *arguments, devices_each=1, timeout=300):
  """Runs `count` processes of one run; returns their outputs."""
  processes = start_processes(workdir, count, *arguments, devices_each=devices_each)
  outputs = [process.communicate(timeout=timeout)[0] for process in processes]
  assert [process.returncode for process in processes] == [0] * count, "\n".join(outputs)
  return outputs


def test_port_in_use_raises():
  with socket.create_server(("", 0)) as other:
    port = other.getsockname()[1]
    with pytest.raises(OSError, match=f"--coordinator=localhost:{port}: port {port} "):
      distributed.initialize(f"localhost:{port}", 2, 0)


def test_incomplete_process_flags_raise():
  with pytest.raises(ValueError, match="--num_processes=2"):
    distributed.initialize(None, 2, None)


def test_detected_coordinator_port_in_use_raises(monkeypatch):
  slurm = {"JOB_ID": 1, "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": 0, "LOCALID": 0}
  for name, value in slurm.items():
    monkeypatch.setenv(f"SLURM_{name}", str(value))
  with socket.create_server(("", 0)) as other:
    port = other.getsockname()[1]
    monkeypatch.setenv("JAX_COORDINATOR_PORT", str(port))
    with pytest.raises(OSError, match=f"coordinator=localhost:{port}: port {port}"):
      distributed.initialize()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"here:{port}")
    with pytest.raises(OSError, match=f"JAX_COORDINATOR_ADDRESS=here:{port}"):
      distributed.initialize()


@pytest.mark.parametrize(
  "address", ["localhost", "localhost:", "localhost:http", "localhost:70000"]
)
def test_coordinator_without_port_raises(address):
  with pytest.raises(ValueError, match=f"--coordinator={address}"):
    distributed.initialize(address, 2, 1)


SHORT = (
  *command.TINY,
  "--config.num_steps=6",
  "--config.eval_every=6",
  "--config.eval_batch_size=16",
)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("one") / "run"
  command.run(workdir, *SHORT)
  return workdir


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("two") / "run"
  return workdir, run_processes(workdir, 2, *SHORT, devices_each=2)


@pytest.mark.long
def test_two_processes_equal_one(one_process, two_processes):
  workdir, (first, second) = two_processes
  assert "done after 6 steps" in first
  assert "step" not in second  # only process 0 logs
  assert_same_run(one_process, workdir)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("mesh", "devices_each"),
  [
    (("data=1", "fsdp=-1"), 2),
    (("data=1", "model=2"), 1),  # both processes read all images, each of which is counted once
  ],
  ids=str,
)
def test_two_processes_equal_one_on_other_meshes(one_process, tmp_path, mesh, devices_each):
  sizes = [f"--config.sharding.mesh.{size}" for size in mesh]
  run_processes(tmp_path / "run", 2, *SHORT, *sizes, devices_each=devices_each)
  assert_same_run(one_process, tmp_path / "run")


def assert_same_run(one_process, workdir):
  expected, found = command.rows(one_process), command.rows(workdir)
  assert len(expected) == len(found) > 3
  for ours, theirs in zip(found, expected, strict=True):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
      # 40 test images are two full batches and one of 8, whose mask is split over the processes.
      tolerance = 0 if name in ("step", "test/accuracy", "test/images") else 1e-5
      assert ours[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (name, ours["step"])
  assert found[-1]["test/images"] == 40
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5),
    restore_variables(workdir)["params"]["head"],
    restore_variables(one_process)["params"]["head"],
  )


@pytest.mark.long
def test_one_process_restores_run_of_two(one_process, two_processes):
  workdir, _ = two_processes
  assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["6"]
  output = command.run(workdir, *SHORT)
  assert "evaluating step 6 " in output
  assert f"test/accuracy {command.rows(one_process)[-1]['test/accuracy']:.4g}" in output


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [("data=-1",), ("data=2", "fsdp=2"), ("data=2", "model=2")])
def test_four_processes_equal_one(one_process, tmp_path, mesh):
  sizes = [f"--config.sharding.mesh.{size}" for size in mesh]
  run_processes(tmp_path / "run", 4, *SHORT, *sizes, timeout=600)
  for ours, theirs in zip(command.rows(tmp_path / "run"), command.rows(one_process), strict=True):
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


PANOPTIC = (
  "--config=configs/detr.py:demo_panoptic,batch_size=8,init_from=",
  "--config.model.width=32",
  "--config.model.mlp_dim=16",
  "--config.model.decoder_depth=2",
  "--config.model.backbone.widths=(8,8,8,8)",
  "--config.model.backbone.stem_width=8",
  "--config.optimizer.learning_rate=0.01",
  "--config.optimizer.schedule.warmup_steps=2",
  "--config.log_every=1",
  "--config.eval_batch_size=4",
  "--config.data.eval.test.split=test[:13]",
  "--config.task.segment_threshold=0.01",
)


@pytest.mark.slow
def test_detr_losses_equal_over_processes(tmp_path):
  """DETR's losses are normalised by the boxes and queries of the global batch."""
  short = (*PANOPTIC, "--config.num_steps=3", "--config.eval_every=0")
  command.run(tmp_path / "one", *short)
  run_processes(tmp_path / "two", 2, *short)
  found, expected = command.rows(tmp_path / "two"), command.rows(tmp_path / "one")
  assert {"train/box_loss", "train/class_loss_0", "train/dice_loss"} <= expected[0].keys()
  for ours, theirs in zip(found, expected, strict=True):
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_detr_evaluation_equal_over_processes(tmp_path):
  """13 images: both processes have the same image in the last batch."""
  steps = (*PANOPTIC, "--config.num_steps=60", "--config.eval_every=60")
  alone = scores_of(command.run(tmp_path, *steps))
  assert alone["test/images"] == 13
  assert alone["test/box_ap50"] > 0
  assert "test/pq" in alone
  first, second = run_processes(tmp_path, 2, *steps, "--eval_only")
  assert scores_of(first) == alone
  assert "done" not in second


def scores_of(output):
  """Returns the scores in a run's last line."""
  words = output.partition("done after 60 steps: ")[2].splitlines()[0].split()
  return dict(zip(words[::2], map(float, words[1::2]), strict=True))


ENDLESS = (
  *command.TINY,
  "--config.num_steps=100000",
  "--config.eval_every=0",
  "--config.checkpoint.every=20",
)


def wait_for_checkpoint(workdir, processes, seconds=900):
  deadline = time.monotonic() + seconds
  while not find_steps(workdir):
    assert time.monotonic() < deadline
    assert all(process.poll() is None for process in processes), "a process ended"
    time.sleep(0.05)


def find_steps(workdir):
  return sorted(
    int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("count", "victim"),
  [
    (2, 1),
    (2, 0),  # the coordinator
    (4, 2),
  ],
)
def test_killed_process_stops_others_and_restart_resumes(tmp_path, count, victim):
  workdir = tmp_path / "run"
  processes = start_processes(workdir, count, *ENDLESS)
  try:
    wait_for_checkpoint(workdir, processes)
    killed = time.monotonic()
    processes[victim].send_signal(signal.SIGKILL)
    for process in (*processes[:victim], *processes[victim + 1 :]):
      output, _ = process.communicate(timeout=killed + 60 - time.monotonic())
      assert process.returncode not in (0, 143), output
  finally:
    for process in processes:
      process.kill()
      process.communicate()
  last = find_steps(workdir)[-1]
  length = (f"--config.num_steps={last + 2}", "--allow_config_change")
  first, *_ = run_processes(workdir, count, *ENDLESS, *length, timeout=900)
  assert f"resumed at step {last} " in first
  assert f"done after {last + 2} steps" in first


@pytest.mark.slow  # training/test_preemption.py compares settings of two processes
def test_different_configs_raise(tmp_path):
  rates = ("--config.optimizer.learning_rate=0.001", "--config.optimizer.learning_rate=0.002")
  coordinator = f"--coordinator=localhost:{free_port()}"
  processes = [
    command.start(
      tmp_path / "run",
      *SHORT,
      rates[i],
      coordinator,
      "--num_processes=2",
      f"--process_id={i}",
      JAX_ENABLE_COMPILATION_CACHE="0",
    )
    for i in range(2)
  ]
  for process in processes:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert "error: config.optimizer.learning_rate: 0.001 on process 0, 0.002 on process 1" in output
  assert not (tmp_path / "run").exists()
