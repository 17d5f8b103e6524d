"""Meshes, sharding rules, host-to-device batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tests.trees import flatten_paths
from vit_jax_zoo.ops.sharding import shard_batch
from vit_jax_zoo.training import sharding

pytestmark = pytest.mark.multidevice


def shapes(**leaves):
  return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


@pytest.mark.parametrize(
  ("sizes", "expected"),
  [
    ({"data": -1}, (8, 1, 1)),
    ({"data": 2, "fsdp": -1}, (2, 4, 1)),
    ({"data": 2, "fsdp": 2, "model": 2}, (2, 2, 2)),
    ({"fsdp": -1, "model": 8}, (1, 1, 8)),
  ],
)
def test_mesh_sizes(sizes, expected):
  mesh = sharding.create_mesh(sizes)
  assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "model")) == expected


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"data": 3}, "data=3 .*8 device"),
    ({"data": -1, "model": 3}, "8 device"),
    ({"data": -1, "fsdp": -1}, "8 device"),
    ({"data": 0, "fsdp": -1}, "8 device"),
    ({"dta": -1}, "'dta'.*'data'"),
  ],
)
def test_invalid_mesh_raises(sizes, message):
  with pytest.raises(ValueError, match=message) as error:
    sharding.create_mesh(sizes)
  assert "\n" not in str(error.value)


def test_check_batch_size():
  mesh = sharding.create_mesh({"data": 4, "fsdp": 2})
  sharding.check_batch_size(32, mesh, accumulation_steps=4)
  with pytest.raises(ValueError, match=r"batch_size: 20 .* such as 16"):
    sharding.check_batch_size(20, mesh)
  with pytest.raises(ValueError, match="32, such as 32"):
    sharding.check_batch_size(8, mesh, accumulation_steps=4)


def test_parameter_specs_right_aligned_first_match():
  mesh = sharding.create_mesh({"data": 1, "fsdp": 4, "model": 2})
  params = {
    "blocks": shapes(kernel=(12, 64, 128)),
    "block_0": shapes(kernel=(64, 128), bias=(128,)),
    "odd": shapes(kernel=(63, 8192)),
    "tiny": shapes(kernel=(8, 8)),
  }
  rules = ((r"block.*/kernel", ("fsdp", "model")), (r".*/bias", ()), (r".*", "fsdp"))
  specs = sharding.parameter_specs(params, rules, mesh)
  assert specs["blocks"]["kernel"] == P(None, "fsdp", "model")
  assert specs["block_0"] == {"kernel": P("fsdp", "model"), "bias": P()}
  assert specs["odd"]["kernel"] == P(None, "fsdp")
  assert specs["tiny"]["kernel"] == P()  # too small to be sharded


@pytest.mark.parametrize(
  ("shape", "spec", "message"),
  [
    ((6, 128), ("fsdp", None), r"'w' \(6, 128\): dimension 0 .*'fsdp' has 4"),
    ((128,), ("fsdp", None), "2 dimensions"),
  ],
)
def test_inapplicable_rule_raises(shape, spec, message):
  mesh = sharding.create_mesh({"fsdp": 4, "data": 2})
  with pytest.raises(ValueError, match=message):
    sharding.parameter_specs(shapes(w=shape), ((".*", spec),), mesh)


def test_parameter_without_rule_raises():
  mesh = sharding.create_mesh({"data": 8})
  with pytest.raises(ValueError, match="'w'"):
    sharding.parameter_specs(shapes(w=(2,)), (("v", ()),), mesh)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_optimizer_state_sharded_like_parameters(name):
  mesh = sharding.create_mesh({"fsdp": 8})
  params = {"a": shapes(kernel=(256, 128)), "kernel": jax.ShapeDtypeStruct((64, 256), jnp.float32)}
  specs = sharding.parameter_specs(
    params, (("a/kernel", ("fsdp", None)), ("kernel", (None, "fsdp"))), mesh
  )
  state = jax.eval_shape(getattr(optax, name)(1e-3).init, params)
  found = flatten_paths(sharding.specs_like_parameters(state, params, specs))
  by_shape = {}
  for path, leaf in flatten_paths(state).items():
    by_shape.setdefault(leaf.shape, set()).add(found[path])
  assert by_shape.pop((), {P()}) == {P()}
  for shape, where in by_shape.items():
    expected = {(256, 128): P("fsdp", None), (64, 256): P(None, "fsdp")}.get(shape, P())
    assert where == {expected}, shape


def test_to_global_to_local_round_trip():
  mesh = sharding.create_mesh({"data": 2, "fsdp": 2, "model": 2})
  batch = {"x": np.arange(24).reshape(8, 3), "label": np.arange(8, dtype=np.int32)}
  there = sharding.to_global(batch, mesh)
  assert there["x"].sharding.spec == P(("data", "fsdp"))
  assert len({str(s.index) for s in there["x"].addressable_shards}) == 4
  back = sharding.to_local(there)
  np.testing.assert_array_equal(back["x"], batch["x"])
  np.testing.assert_array_equal(back["label"], batch["label"])
  assert sharding.input_shard(mesh, 8) == (0, 1)


def test_shard_batch_constrains_if_divisible():
  mesh = sharding.create_mesh({"data": 4, "fsdp": 2})
  assert shard_batch(jnp.ones((3, 2))).shape == (3, 2)  # no mesh
  with jax.set_mesh(mesh):
    put = jax.jit(lambda x: shard_batch(x * 2))
    assert put(jnp.ones((16, 2))).sharding.spec == P(("data", "fsdp"))
    assert put(jnp.ones((6, 2))).sharding.is_fully_replicated  # 6 rows are not divisible by 8
