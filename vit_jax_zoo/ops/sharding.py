"""Sharding of activations over the batch axes of the device mesh."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

BATCH_AXES = ("data", "fsdp")  # the mesh axes over which a batch is split


def shard_batch(x: Shaped[Array, "b ..."]) -> Shaped[Array, "b ..."]:
  """Shards the first axis over the mesh's batch axes, if there is a mesh and it is divisible.

  Called in every block of a model: otherwise XLA may gather activations instead of parameters (five
  times the memory for a ViT-L step on 16 chips).
  """
  axes = splitting_axes(x.shape[0])
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def on_own_examples(function: Callable[..., Any], *args: Shaped[Array, "b ..."]) -> Any:
  """Returns `function(*args)`, computed by each device for its own part of the batch.

  For loops whose length depends on the example: the devices would synchronise in each iteration.
  The first axis of all arrays is the example's.
  """
  if not (axes := splitting_axes(args[0].shape[0])):
    return function(*args)
  split = PartitionSpec(axes)
  return jax.shard_map(function, in_specs=split, out_specs=split, check_vma=False)(*args)


def splitting_axes(batch_size: Any) -> tuple[str, ...]:
  """Returns the mesh axes that split a batch of this (maybe symbolic) size; () if not divisible."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
  ways = math.prod(mesh.shape[axis] for axis in axes)
  return () if ways == 1 or batch_size % ways else axes


def is_for_cpu() -> bool:
  """Returns whether the traced program is for CPUs: by the mesh's devices, else JAX's default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (device.platform if device else jax.default_backend()) == "cpu"
