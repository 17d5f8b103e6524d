"""Where activations live on the device mesh: the one constraint that models state themselves."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

BATCH_AXES = ("data", "fsdp")
"""The mesh axes over which a batch is split: every device works on examples of its own."""


def shard_batch(x: Shaped[Array, "b ..."]) -> Shaped[Array, "b ..."]:
  """Keeps the first axis of `x` split over the mesh's batch axes, and the others whole.

  Models call it once in every block: without the constraint XLA may choose to gather activations
  instead of parameters (a ViT-L step for 16 chips then takes five times the memory). Outside a mesh
  (`jax.set_mesh`), or where the first axis cannot be split evenly, it does nothing.
  """
  axes = _splitting_axes(x.shape[0])
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def on_own_examples(function: Callable[..., Any], *args: Shaped[Array, "b ..."]) -> Any:
  """Returns `function(*args)`, computed by every device for its own part of the batch.

  For functions that treat examples one by one, in loops whose length depends on the data: left to
  itself, XLA lets all devices agree on every round. Like `shard_batch` it does nothing where the
  batch is not split.

  Args:
    function: takes and returns arrays whose first axis is the example.
    *args: its arguments.
  """
  axes = _splitting_axes(args[0].shape[0])
  if not axes:
    return function(*args)
  split = PartitionSpec(axes)
  return jax.shard_map(function, in_specs=split, out_specs=split, check_vma=False)(*args)


def _splitting_axes(batch_size: Any) -> tuple[str, ...]:
  """Returns the mesh axes over which a batch of this size is split, none if it is not.

  Args:
    batch_size: a number, or its symbol where a program is exported for batches of any size.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
  ways = math.prod(mesh.shape[axis] for axis in axes)
  return () if ways == 1 or batch_size % ways else axes
