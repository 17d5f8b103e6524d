"""Signals become a flag; hosts agree on a step; handlers come back."""

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


def test_a_signal_is_remembered_and_handlers_come_back():
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with preemption_guard() as requested:
    assert not requested(0)
    os.kill(os.getpid(), signal.SIGTERM)
    assert requested(1)
    assert requested(2), "and stays so"
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
  with preemption_guard() as requested:
    assert not requested(0), "a new life"


def test_the_second_interrupt_is_one():
  with preemption_guard() as requested:
    os.kill(os.getpid(), signal.SIGINT)
    assert requested(1)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_outside_the_main_thread_signals_are_left_alone():
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
from vit_jax_zoo.training.loop import preemption_guard
index, count, port, workdir = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if count > 1:
  jax.distributed.initialize("localhost:" + port, count, index)
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


def run_and_terminate_the_first(count, workdir):
  """Starts `count` processes, sends SIGTERM to one, and returns what each printed last."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", LOOP, str(index), str(count), str(port), str(workdir)],
      stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    for index in range(count)
  ]  # fmt: skip
  try:
    for process in processes:
      assert process.stdout.readline() == "ready\n"
    processes[0].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count
  finally:
    for process in processes:
      process.kill()
      process.wait()
      process.stdout.close()
  return [output.splitlines()[-1] for output in outputs]


@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_saves_and_leaves(tmp_path, count):
  lasts = run_and_terminate_the_first(count, tmp_path)
  assert len(set(lasts)) == 1, "all processes stop at the same step"
  (checkpoint,) = (tmp_path / "checkpoints").iterdir()
  assert lasts[0] == f"stopped at {checkpoint.name}"
