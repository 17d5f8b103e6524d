"""SIGTERM and SIGINT set a flag; all processes stop at the same step; handlers are restored."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import pytest

from vit_jax_zoo.training.loop import preemption_guard

REPOSITORY = pathlib.Path(__file__).parents[2]


def test_signal_sets_flag_handlers_restored():
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with preemption_guard() as requested:
    assert not requested(0)
    os.kill(os.getpid(), signal.SIGTERM)
    assert requested(1)
    assert requested(2), "the flag is kept"
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
  with preemption_guard() as requested:
    assert not requested(0), "the flag is reset"


def test_second_interrupt_raises():
  with preemption_guard() as requested:
    os.kill(os.getpid(), signal.SIGINT)
    assert requested(1)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_no_handlers_outside_main_thread():
  before = signal.getsignal(signal.SIGTERM)
  found = []

  def enter():
    with preemption_guard() as requested:
      found.append(requested(0))

  thread = threading.Thread(target=enter)
  thread.start()
  thread.join()
  assert found == [False]
  assert signal.getsignal(signal.SIGTERM) is before


LOOP = """
import sys, time
import jax
import numpy as np
from vit_jax_zoo.training.checkpoint import Checkpointer, restore_variables
from vit_jax_zoo.training.distributed import check_equal, check_equal_arrays
from vit_jax_zoo.training.loop import preemption_guard
index, count, port, workdir = int(sys.argv[1]), 2, sys.argv[2], sys.argv[3]
jax.distributed.initialize("localhost:" + port, count, index)
weights = {"head": {"bias": np.zeros(2, np.float32), "kernel": np.full(2, index, np.float32)}}
for check in (lambda: check_equal(lambda: {"seed": index}), lambda: check_equal_arrays(weights)):
  try:
    check()
  except ValueError as error:
    print(error, flush=True)
check_equal_arrays({"params": jax.numpy.ones(3)})
with preemption_guard() as requested:
  for step in range(100000):
    if step == 3:
      print("ready", flush=True)
    time.sleep(0.02)
    if requested(step):
      break
mesh = jax.make_mesh((count,), ("data",), (jax.sharding.AxisType.Auto,))
sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
x = jax.make_array_from_callback((4,), sharding, lambda i: np.arange(4.0, dtype=np.float32)[i])
with Checkpointer(workdir) as checkpointer:
  checkpointer.save(step, {"params": {"x": x}, "model_state": {}})
  checkpointer.save_best(step, {"params": {"x": x}}, 0.5)
  checkpointer.wait()
  restored = checkpointer.restore({"params": {"x": x}, "model_state": {}})["params"]
for found in (restored, restore_variables(workdir, {"params": {"x": x}})["params"]):
  for shard in found["x"].addressable_shards:
    np.testing.assert_array_equal(shard.data, np.arange(4.0)[shard.index])
print("stopped at", step, flush=True)
"""


def run_and_terminate_the_first(workdir):
  """Starts two processes, sends SIGTERM to the first; returns first lines and last of each."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", LOOP, str(index), str(port), str(workdir)],
      stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    for index in range(2)
  ]  # fmt: skip
  try:
    # Gloo's log line comes first.
    lines = [list(iter(process.stdout.readline, "ready\n")) for process in processes]
    differences = [found[-2:] for found in lines]
    processes[0].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
  finally:
    for process in processes:
      process.kill()
      process.wait()
      process.stdout.close()
  return differences, [output.splitlines()[-1] for output in outputs]


def test_two_processes_compare_settings_and_stop_at_same_step(tmp_path):
  differences, lasts = run_and_terminate_the_first(tmp_path)
  for setting, weights in differences:
    assert setting.startswith("seed: 0 on process 0, 1 on process 1")
    assert weights.startswith("checksum of head/kernel: ")
  assert len(set(lasts)) == 1, "all processes stop at the same step"
  (checkpoint,) = (tmp_path / "checkpoints").iterdir()
  assert lasts[0] == f"stopped at {checkpoint.name}"
