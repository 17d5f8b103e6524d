"""Compiles a function for one TPU core: FLOPs, memory traffic, temporaries, minimum time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax_zoo.ops.flops import count_flops
from vit_jax_zoo.planning import hlo
from vit_jax_zoo.planning.hardware import Machine
from vit_jax_zoo.planning.plan import Roofline, compile_text, roofline
from vit_jax_zoo.training.sharding import create_mesh


class Cost(NamedTuple):
  """Cost of one call on one core."""

  flops: float  # from the jaxpr
  memory_bytes: float  # traffic to and from main memory, from the compiled program
  temporary_bytes: int
  bound: Roofline  # lower bound on the time, from the chip's peaks


def compile_for_core(
  function: Callable[..., Any],
  arguments: tuple[Any, ...],
  machine: Machine,
  donate: tuple[int, ...] = (),
) -> Cost:
  """Compiles a function of arrays for the first core of a machine, which need not be attached.

  `arguments` are shapes and dtypes; `donate` are indices of those whose buffers are donated.
  """
  mesh = create_mesh({}, machine.devices[:1])
  core = NamedSharding(mesh, PartitionSpec())
  jitted = jax.jit(function, in_shardings=core, out_shardings=core, donate_argnums=donate)
  with jax.set_mesh(mesh):  # determines the attention kernel
    compiled, text = compile_text(jitted.lower(*arguments))
    flops, moved = count_flops(function, *arguments), hlo.traffic(text).memory_bytes
  bound = roofline(machine.chip, flops=flops, memory_bytes=moved, network_bytes=0.0)
  return Cost(flops, moved, compiled.memory_analysis().temp_size_in_bytes, bound)
