"""Size of the activations kept for the backward pass, which remat trades for compute."""

from typing import Any

import jax
import numpy as np

from vit_jax_zoo.tasks.base import LossContext, OptimGroup
from vit_jax_zoo.training.compiled_steps import Program
from vit_jax_zoo.training.sharding import batch_ways


def activation_bytes(program: Program, accumulation_steps: int = 1) -> float:
  """Returns the bytes per device, of the optimizer group with the most.

  Counts the residuals of differentiation before XLA fuses any of them, split over the devices
  as the batch is; without parameters and other inputs.

  Args:
    program: of the run; nothing is executed.
    accumulation_steps: number of micro-batches.
  """
  batch = {
    key: jax.ShapeDtypeStruct((leaf.shape[0] // accumulation_steps, *leaf.shape[1:]), leaf.dtype)
    for key, leaf in program.abstract_batch.items()
  }
  kept = max(_kept(program, group, batch) for group in program.task.optim_groups)
  return kept / batch_ways(program.mesh)


def _kept(program: Program, group: OptimGroup, batch: Any) -> float:
  def forward(state: Any, batch: Any) -> list[jax.Array]:
    context = LossContext(
      rng=jax.random.wrap_key_data(state.rng),
      step=state.step,
      normalizers=program.task.normalizers(batch),
      optim_group=group.name,
    )

    def loss(own: Any) -> tuple[Any, Any]:
      params = group.insert(state.params, own)
      output = program.task.loss({"params": params, **state.model_state}, batch, context)
      return output.loss, None

    _, backward, _ = jax.vjp(loss, group.select(state.params), has_aux=True)
    given = {id(leaf) for leaf in jax.tree.leaves((state, batch))}
    return [leaf for leaf in jax.tree.leaves(backward) if id(leaf) not in given]

  with jax.set_mesh(program.mesh):
    leaves = jax.eval_shape(forward, program.abstract_state, batch)
  return float(sum(_bytes(leaf) for leaf in leaves))


def _bytes(leaf: Any) -> float:
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return 8.0 * leaf.size
  return float(np.prod(leaf.shape, dtype=float)) * leaf.dtype.itemsize
