"""Where activations live on the device mesh: the one constraint that models state themselves."""

import math

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
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
  ways = math.prod(mesh.shape[axis] for axis in axes)
  if ways == 1 or x.shape[0] % ways:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))
