"""Device mesh, sharding rules of parameters, and global batches across hosts.

A mesh has three axes. `data` and `fsdp` shard the batch; `fsdp` also shards parameters and
optimizer state, which XLA gathers layer by layer; `model` shards the layers (tensor parallelism).
Results do not depend on the mesh, up to float rounding.

Each model has rules: `((pattern, spec), ...)`. The first pattern that matches the whole "/"-joined
path of a parameter applies. A spec is

* a tuple of axis names and None, one for each dimension, aligned on the right: the leading layer
  axis of scanned layers is not sharded;
* an axis name: it shards the largest dimension that it divides;
* `()`: the parameter is replicated.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax_zoo.errors import check_names
from vit_jax_zoo.ops.sharding import BATCH_AXES

AXES = (*BATCH_AXES, "model")

Spec: TypeAlias = str | tuple[str | None, ...]
Rules: TypeAlias = Sequence[tuple[str, Spec]]

FSDP_MIN_SIZE = 2**12  # elements; smaller parameters are replicated: the gather costs more


class ShardingRuleError(ValueError):
  """A rule cannot be applied to a parameter on this mesh."""


def create_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Arranges the devices along `AXES`; sizes are 1 by default, and one may be -1: the remaining."""
  devices = jax.devices() if devices is None else devices
  check_names("mesh axis", sizes, AXES)
  shape = [sizes.get(axis, 1) for axis in AXES]
  fixed = math.prod(size for size in shape if size != -1)
  if shape.count(-1) == 1 and fixed > 0 and len(devices) % fixed == 0:
    shape[shape.index(-1)] = len(devices) // fixed
  if math.prod(shape) != len(devices) or min(shape) < 1:
    given = " x ".join(f"{axis}={sizes.get(axis, 1)}" for axis in AXES)
    expected = "that number as their product; one may be -1"
    raise ValueError(f"mesh {given}: {len(devices)} device(s); expected {expected}")
  return jax.make_mesh(tuple(shape), AXES, (AxisType.Auto,) * len(AXES), devices=tuple(devices))


def batch_ways(mesh: Mesh) -> int:
  """Returns the number of parts of a batch on the mesh."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(batch_size: int, mesh: Mesh, accumulation_steps: int = 1) -> None:
  """Raises ValueError unless every micro-batch can be split evenly over the mesh."""
  parts = batch_ways(mesh) * accumulation_steps
  if batch_size % parts:
    nearest = max(parts, round(batch_size / parts) * parts)
    raise ValueError(
      f"batch_size: {batch_size} cannot be split evenly over {batch_ways(mesh)} device(s)"
      f" (mesh data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}) in {accumulation_steps}"
      f" accumulation step(s); expected a multiple of {parts}, such as {nearest}"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a replicated array."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch, by its first axis."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def parameter_specs(abstract_params: Any, rules: Iterable[Any], mesh: Mesh) -> Any:
  """Returns a tree like `abstract_params` with a PartitionSpec for each parameter, by the rules."""
  rules = [_checked(rule) for rule in rules]
  flat: dict[str, Any] = traverse_util.flatten_dict(abstract_params, sep="/")
  specs = {path: _spec_of(path, leaf.shape, rules, mesh) for path, leaf in flat.items()}
  return traverse_util.unflatten_dict(specs, sep="/")


def _checked(rule: Any) -> tuple[str, Spec]:
  try:
    pattern, spec = rule
    re.compile(pattern)
    axes = (spec,) if isinstance(spec, str) else tuple(spec)
  except (TypeError, ValueError, re.error):
    raise ValueError(f"sharding.rules: {rule!r}; expected a pair, as ('.*', 'fsdp')") from None
  check_names(f"axis of the sharding rule {pattern!r}", filter(None, axes), AXES)
  return pattern, spec if isinstance(spec, str) else axes


def _spec_of(path: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh) -> PartitionSpec:
  matching = ((pattern, spec) for pattern, spec in rules if re.fullmatch(pattern, path))
  pattern, spec = next(matching, (None, ()))
  if pattern is None:
    raise ValueError(f"sharding.rules: none matches {path!r} {shape}; append ('.*', 'fsdp')")
  if isinstance(spec, str):
    ways = mesh.shape[spec]
    fitting = [i for i, size in enumerate(shape) if size % ways == 0]
    if ways == 1 or not fitting or math.prod(shape) < FSDP_MIN_SIZE:
      return PartitionSpec()
    largest = max(fitting, key=lambda i: shape[i])
    return PartitionSpec(*(spec if i == largest else None for i in range(len(shape))))
  problem = f"sharding rule ({pattern!r}, {spec}) cannot apply to parameter {path!r} {shape}: "
  if len(spec) > len(shape):
    raise ValueError(f"{problem}the spec has {len(spec)} dimensions")
  aligned = (None,) * (len(shape) - len(spec)) + spec
  for i, (size, axis) in enumerate(zip(shape, aligned, strict=True)):
    if axis and size % (ways := mesh.shape[axis]):
      raise ShardingRuleError(f"{problem}dimension {i} has {size} elements, {axis!r} has {ways}")
  used = [axis if axis and mesh.shape[axis] > 1 else None for axis in aligned]
  return PartitionSpec(*used) if any(used) else PartitionSpec()


def specs_like_parameters(tree: Any, abstract_params: Any, specs: Any) -> Any:
  """Returns a spec for each leaf of an optimizer state: its parameter's, else replicated."""
  flat_specs: dict[str, Any] = traverse_util.flatten_dict(specs, sep="/")
  flat_params: dict[str, Any] = traverse_util.flatten_dict(abstract_params, sep="/")

  def spec_of(path: Any, leaf: Any) -> PartitionSpec:
    parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    for start in range(len(parts)):  # longest suffix first
      name = "/".join(parts[start:])
      if name in flat_params and flat_params[name].shape == leaf.shape:
        return flat_specs[name]
    return PartitionSpec()

  return jax.tree_util.tree_map_with_path(spec_of, tree)


def named_shardings(specs: Any, mesh: Mesh) -> Any:
  """Binds a tree of PartitionSpecs to the mesh."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def input_shard(mesh: Mesh, batch_size: int) -> tuple[int, int]:
  """Returns the part of a batch that this process loads, equal along `model`: (index, number)."""
  rows: dict[int, set[int]] = {}
  for device, (index, *_) in batch_sharding(mesh).devices_indices_map((batch_size,)).items():
    rows.setdefault(device.process_index, set()).add(index.start or 0)
  parts = sorted({tuple(sorted(starts)) for starts in rows.values()})
  return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Returns global arrays, sharded over the mesh, from the rows of each process."""
  sharding = batch_sharding(mesh)
  make = jax.make_array_from_process_local_data
  return {key: make(sharding, np.asarray(value)) for key, value in batch.items()}


def to_local(tree: Any) -> Any:
  """Fetches this process's rows of global arrays: the inverse of `to_global`."""

  def rows(array: jax.Array) -> np.ndarray:
    shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])

  return jax.tree.map(rows, tree)
