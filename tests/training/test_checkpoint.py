"""Checkpoints: bit-exact on any mesh, with donation, SIGKILL and restarts."""

import dataclasses
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax_zoo.training.checkpoint import Checkpointer, find_checkpoint, restore_variables


@struct.dataclass
class State:
  step: Any
  params: Any
  model_state: Any
  opt_state: Any
  ema: Any
  rng: Any


def make_state(seed=0, with_ema=True):
  rng = jax.random.key(seed)
  params = {
    "dense": {"kernel": jax.random.normal(rng, (8, 16)), "bias": jnp.full(16, 0.1, jnp.bfloat16)},
    "frozen": jnp.asarray([-0.0, np.nan, 1e-40, np.inf], jnp.float32),
  }
  transform = optax.masked(optax.adam(1e-3), {"dense": True, "frozen": False})
  model_state = {"batch_stats": {"mean": jnp.arange(8.0)}}
  averaged = jax.tree.map(lambda x: x * 2, {"params": params, **model_state})
  return State(
    step=jnp.asarray(seed, jnp.int32),
    params=params,
    model_state=model_state,
    opt_state=(transform.init(params),),
    ema=averaged if with_ema else None,
    rng=jax.random.key_data(rng),
  )


def mesh_of(*sizes):
  axes = ("data", "fsdp", "model")[: len(sizes)]
  count = int(np.prod(sizes))
  return jax.make_mesh(sizes, axes, (AxisType.Auto,) * len(sizes), devices=jax.devices()[:count])


def abstract(tree, mesh=None, spec=None):
  """Returns the tree's shapes; matrices are sharded by `spec`, other leaves replicated."""

  def leaf_of(leaf):
    if mesh is None:
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    sharding = NamedSharding(mesh, spec if leaf.ndim == 2 else P())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(leaf_of, tree)


def assert_same_bits(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A workdir with a checkpoint of step 7, saved from eight devices."""
  workdir = tmp_path_factory.mktemp("run")
  state = make_state(7)
  placed = jax.device_put(
    state, jax.tree.map(lambda a: a.sharding, abstract(state, mesh_of(8), P("data")))
  )
  with Checkpointer(workdir) as checkpointer:
    assert checkpointer.restore(abstract(state)) is None
    assert checkpointer.save(7, placed)
  return workdir, state


@pytest.mark.multidevice
@pytest.mark.parametrize(
  ("sizes", "spec"), [((8,), P("data")), ((2, 4), P("fsdp", "data")), ((1,), P())]
)
def test_restore_bit_exact_on_any_mesh(run, sizes, spec):
  workdir, state = run
  target = abstract(state, mesh_of(*sizes), spec)
  with Checkpointer(workdir) as checkpointer:
    restored = checkpointer.restore(target)
    assert checkpointer.latest_step == 7
    assert not checkpointer.save(7, restored), "the step is there already"
  assert_same_bits(restored, state)
  assert restored.params["dense"]["kernel"].sharding == target.params["dense"]["kernel"].sharding


def test_restore_mismatch_names_all_leaves(run):
  workdir, state = run
  target = abstract(state)
  target.params["dense"]["kernel"] = jax.ShapeDtypeStruct((8, 4), jnp.float32)
  target.params["dense"]["bias"] = jax.ShapeDtypeStruct((16,), jnp.float32)
  target.params["new"] = target.params.pop("frozen")
  with (
    Checkpointer(workdir) as checkpointer,
    pytest.raises(ValueError, match="does not fit") as error,
  ):
    checkpointer.restore(target)
  message = str(error.value)
  assert "\n" not in message
  assert "params/dense/kernel has shape (8, 16); expected (8, 4)" in message
  assert "params/dense/bias is bfloat16; expected float32" in message
  assert "params/new is not in the checkpoint" in message
  assert "params/frozen is only in the checkpoint" in message


def test_save_with_donated_buffers(tmp_path):
  step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  sharding = NamedSharding(mesh_of(8), P("data"))
  for place in (sharding, jax.devices()[0]):
    state = {str(i): jax.device_put(jnp.zeros((512, 512)), place) for i in range(20)}
    state = step(state)
    with Checkpointer(tmp_path / str(hash(place))) as checkpointer:
      checkpointer.save(1, state)
      for _ in range(5):  # would overwrite donated buffers during the write
        state = step(state)
      checkpointer.wait()
      restored = checkpointer.restore(abstract(state))
    for leaf in jax.tree.leaves(restored):
      np.testing.assert_array_equal(leaf, np.ones((512, 512)))


def test_keep_newest(tmp_path):
  with Checkpointer(tmp_path, keep=2) as checkpointer:
    for step in range(1, 8):
      checkpointer.save(step, {"x": jnp.full(2, step)})
  kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
  assert kept == [6, 7]


def test_best_score_kept_after_restart(tmp_path):
  def best(checkpointer, step, score):
    return checkpointer.save_best(step, {"params": {"x": jnp.full(2, step)}}, score)

  with Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.best_score is None
    assert best(checkpointer, 10, 0.5)
    assert not best(checkpointer, 20, 0.5), "a tie is no improvement"
    assert not best(checkpointer, 30, float("nan"))
    assert best(checkpointer, 40, 0.7)
  with Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.best_score == 0.7
    assert not best(checkpointer, 15, 0.6)
    assert best(checkpointer, 15, 0.8), "a resumed run may beat it at an earlier step"
    checkpointer.wait()
    assert best(checkpointer, 15, 0.9), "and may repeat a step"
    assert checkpointer.latest_step is None
  assert [path.name for path in (tmp_path / "best").iterdir()] == ["15"]
  np.testing.assert_array_equal(restore_variables(tmp_path)["params"]["x"], [15, 15])


def test_best_mode_min(tmp_path):
  with Checkpointer(tmp_path, best_mode="min") as checkpointer:
    assert checkpointer.save_best(1, {"x": jnp.zeros(1)}, 2.0)
    assert not checkpointer.save_best(2, {"x": jnp.zeros(1)}, 3.0)
    assert checkpointer.save_best(3, {"x": jnp.zeros(1)}, 1.0)
  assert find_checkpoint(tmp_path).name == "3"
  with Checkpointer(tmp_path, best_mode="min") as checkpointer:
    assert checkpointer.best_score == 1.0


def test_best_score_with_leftover_checkpoint(tmp_path):
  runs = tmp_path / "a", tmp_path / "b"
  for workdir, step, score in ((runs[0], 40, 0.7), (runs[1], 15, 0.8)):
    with Checkpointer(workdir) as checkpointer:
      checkpointer.save_best(step, {"x": jnp.zeros(1)}, score)
  shutil.copytree(runs[1] / "best" / "15", runs[0] / "best" / "15")
  assert find_checkpoint(runs[0]).name == "15"
  with Checkpointer(runs[0]) as checkpointer:
    assert checkpointer.best_score == 0.8


def test_restore_variables_prefers_ema(run, tmp_path):
  workdir, state = run
  averaged = state.ema
  plain = {"params": state.params, **state.model_state}
  for path in (workdir, workdir / "checkpoints", workdir / "checkpoints" / "7"):
    found = restore_variables(path)
    assert_same_bits(found, averaged)
    assert isinstance(found["params"]["dense"]["kernel"], np.ndarray)
  target = abstract(averaged, mesh_of(2, 2), P("fsdp"))
  found = restore_variables(workdir, target)
  assert_same_bits(found, averaged)
  assert found["params"]["dense"]["kernel"].sharding.spec == P("fsdp")
  assert_same_bits(restore_variables(workdir, abstract(averaged)), averaged)
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, dataclasses.replace(state, ema=None))
  assert_same_bits(restore_variables(tmp_path), plain)


def test_restore_variables_mismatch_names_all_leaves(run):
  workdir, state = run
  target = abstract({"params": state.params, "other": {"y": jnp.ones(3)}})
  target["params"]["dense"]["kernel"] = jax.ShapeDtypeStruct((8, 4), jnp.float32)
  del target["params"]["frozen"]
  with pytest.raises(ValueError, match="does not fit") as error:
    restore_variables(workdir, target)
  message = str(error.value)
  assert "\n" not in message
  for part in ("dense/kernel has shape (8, 16); expected (8, 4)", "other/y is not in",
               "frozen is only in", "batch_stats/mean is only in"):  # fmt: skip
    assert part in message


def test_find_checkpoint_prefers_best(run, tmp_path):
  _, state = run
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(3, state)
    checkpointer.save_best(2, {"params": {"x": jnp.ones(2)}}, 1.0)
  assert find_checkpoint(tmp_path).parts[-2:] == ("best", "2")
  assert find_checkpoint(tmp_path / "checkpoints").parts[-2:] == ("checkpoints", "3")
  assert list(restore_variables(tmp_path / "best" / "2")["params"]) == ["x"]


def listing(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def half_written(folder):
  """Creates a temporary checkpoint directory, as left by an interrupted write."""
  path = folder / "9.orbax-checkpoint-tmp"
  path.mkdir(parents=True)
  (path / "part").write_bytes(b"half")
  return path


def test_open_changes_no_files(tmp_path):
  saved = {"params": {"x": jnp.arange(3.0)}}
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(8, saved)
    checkpointer.save_best(8, saved, 0.5)
  half_written(tmp_path / "checkpoints")
  half_written(tmp_path / "best")
  before = listing(tmp_path)
  with Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.latest_step == 8
    assert checkpointer.best_score == 0.5
    assert_same_bits(checkpointer.restore(abstract(saved)), saved)
  assert listing(tmp_path) == before


def test_first_save_removes_partial_checkpoints(tmp_path):
  saved = {"params": {"x": jnp.arange(3.0)}}
  left = [half_written(tmp_path / name) for name in ("checkpoints", "best")]
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(3, saved)
    checkpointer.wait()
    assert [path.exists() for path in left] == [False, True]
    checkpointer.save_best(3, saved, 0.5)
    checkpointer.wait()
    assert [path.exists() for path in left] == [False, False]
    assert checkpointer.latest_step == 3


def test_open_of_missing_folder_creates_nothing(tmp_path):
  workdir = tmp_path / "missing"
  with Checkpointer(workdir) as checkpointer:
    assert checkpointer.latest_step is None
    assert checkpointer.best_score is None
    assert checkpointer.restore({"x": jnp.zeros(1)}) is None
  assert not workdir.exists()


def test_missing_checkpoint_raises(tmp_path):
  with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
    restore_variables(tmp_path)


SAVE_FOREVER = """
import sys
import jax.numpy as jnp
from vit_jax_zoo.training.checkpoint import Checkpointer
with Checkpointer(sys.argv[1]) as checkpointer:
  step = (checkpointer.latest_step or 0) + 1
  print("ready", flush=True)
  while True:
    checkpointer.save(step, {str(i): jnp.full((512, 512), float(step)) for i in range(24)})
    step += 1
"""


def _kill_during_save(workdir, after, delay):
  """Kills a process that saves in a loop.

  `delay` seconds after a temporary directory exists beside a complete step > `after`.
  """
  process = subprocess.Popen(
    [sys.executable, "-c", SAVE_FOREVER, str(workdir)], stdout=subprocess.PIPE, text=True,
    cwd=pathlib.Path(__file__).parents[2],
  )  # fmt: skip
  try:
    assert process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    folder = workdir / "checkpoints"
    while not (
      list(folder.glob("*tmp*")) and any(int(path.name) > after for path in folder.glob("[0-9]"))
    ):
      assert time.monotonic() < deadline
      assert process.poll() is None
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
  finally:
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize(
  "delays", [(0.0,), pytest.param((0.013, 0.0), marks=pytest.mark.long)], ids=str
)
def test_sigkill_during_save_leaves_complete_checkpoint(tmp_path, delays):
  last = 0
  for delay in delays:
    _kill_during_save(tmp_path, last, delay)
    with Checkpointer(tmp_path) as checkpointer:
      step = checkpointer.latest_step
      target = {str(i): jax.ShapeDtypeStruct((512, 512), jnp.float32) for i in range(24)}
      restored = checkpointer.restore(target)
      checkpointer.save(step + 1, restored)
      checkpointer.wait()
      assert not list((tmp_path / "checkpoints").glob("*tmp*")), "cleared away by the next save"
    assert step > last
    for leaf in jax.tree.leaves(restored):
      np.testing.assert_array_equal(leaf, np.full((512, 512), float(step)))
    last = step + 1
