"""What a program needs on one core of a TPU that is not here, by its compiler."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from vit_jax_zoo.ops.flops import count_flops
from vit_jax_zoo.planning import hlo
from vit_jax_zoo.planning.hardware import Machine
from vit_jax_zoo.planning.plan import compile_text
from vit_jax_zoo.planning.roofline import Roofline, roofline


class Needs(NamedTuple):
  """FLOPs, bytes moved and bytes of temporaries, and the least time."""

  flops: float
  memory_bytes: float
  temporaries: int
  least: Roofline


def compile_for_core(
  function: Callable[..., Any],
  arguments: tuple[Any, ...],
  machine: Machine,
  donate: tuple[int, ...] = (),
) -> Needs:
  """Compiles a function of shapes for the first core of a machine."""
  core = jax.sharding.SingleDeviceSharding(machine.devices[0])
  jitted = jax.jit(function, in_shardings=core, out_shardings=core, donate_argnums=donate)
  compiled, text = compile_text(jitted.lower(*arguments))
  flops, moved = count_flops(function, *arguments), hlo.traffic(text).memory_bytes
  least = roofline(machine.chip, flops=flops, memory_bytes=moved, network_bytes=0.0)
  return Needs(flops, moved, compiled.memory_analysis().temp_size_in_bytes, least)
