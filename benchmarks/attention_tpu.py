r"""Attention with gradients on one TPU chip: the fused kernel beside XLA's own, as compiled.

FLOPs of the kernel are those of its whole grid, traffic is its operands and results once: it reads
keys and values again for every 1,024 queries, for which it computes longer than it reads.

  pip install -e '.[plan]'
  python benchmarks/attention_tpu.py
  python benchmarks/attention_tpu.py --rows=block
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import timing
from flax import linen as nn
from tpu_compile import compile_for_core

from vit_jax_zoo.nn.attention import MultiHeadAttention
from vit_jax_zoo.ops import attention as fused_attention
from vit_jax_zoo.planning.hardware import find_machine
from vit_jax_zoo.planning.plan import seconds
from vit_jax_zoo.systems.fpt import attention as fpt_attention
from vit_jax_zoo.systems.fpt.attention import Similarity, attend
from vit_jax_zoo.systems.igpt.model import DecoderBlock

HEADER = (
  "with gradients", "attention", "TFLOP", "traffic, GB", "temporaries, MB", "compute", "memory",
)  # fmt: skip
Row = tuple[str, Callable[..., Any], tuple[Any, ...]]


def shape(*sides: int) -> jax.ShapeDtypeStruct:
  """Returns the shape of a bfloat16 array."""
  return jax.ShapeDtypeStruct(sides, jnp.bfloat16)


def rows() -> Iterator[Row]:
  """Yields a name, a function, and the shapes of its arguments."""
  block = DecoderBlock(16, 6144, 48, dtype=jnp.bfloat16)
  yield of_module("block of igpt_l, 8 x 1024", block, shape(8, 1024, 1536))
  for sides in ((8, 577, 1024), (64, 384, 1024), (64, 257, 1280), (64, 197, 1024)):
    attention = MultiHeadAttention(16, dtype=jnp.bfloat16)
    yield of_module(f"16 heads, {' x '.join(map(str, sides))}", attention, shape(*sides))
  dropping = MultiHeadAttention(8, dropout_rate=0.1, dtype=jnp.bfloat16)
  variables = jax.eval_shape(dropping.init, jax.random.key(0), shape(4, 975, 256))

  def drop(variables: Any, x: jax.Array) -> jax.Array:
    key = jax.random.key(x[0, 0, 0].astype(jnp.int32))  # not known to the compiler
    return dropping.apply(variables, x, train=True, rngs={"dropout": key})

  yield (
    "DETR's 8 heads, dropout, 4 x 975 x 256",
    jax.checkpoint(drop),
    (variables, shape(4, 975, 256)),
  )
  fine, middle, coarse = 200 * 336, 100 * 168, 50 * 84  # levels of an image of 800x1344
  maps = (
    (1, "dot", 2, fine, fine),
    (2, "dot", 2, middle, middle),
    (2, "euclidean", 4, fine, middle),
    (2, "euclidean", 4, fine, coarse),
  )
  for batch, kind, parts, queries, keys in maps:
    sides = ((batch, queries, 256), (batch, keys, 256), (batch, keys, 256))
    arrays = (*(shape(*side) for side in sides), jax.ShapeDtypeStruct((batch, parts), jnp.float32))
    name = f"FPT's {parts} parts, {batch} x {queries} x {keys}"
    yield name, lambda *x, kind=kind: attend(*x, Similarity(kind)), arrays


def of_module(name: str, module: nn.Module, x: jax.ShapeDtypeStruct) -> Row:
  """Returns the row of a module with one argument."""
  variables = jax.eval_shape(module.init, jax.random.key(0), x)
  return name, lambda *args: jax.tree.leaves(module.apply(*args))[0], (variables, x)


def main() -> None:
  """Compiles each row with the kernel and without, and prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--topology", default="v5e:2x2", help="TPU slice; one chip of it is used")
  parser.add_argument("--rows", default="", help="part of the names of rows; all by default")
  flags = parser.parse_args()
  machine, table = find_machine("tpu", flags.topology), []
  for name, function, arguments in [row for row in rows() if flags.rows in row[0]]:

    def loss(*args: Any, function: Callable[..., Any] = function) -> jax.Array:
      return jnp.sum(jnp.sin(function(*args).astype(jnp.float32)))

    for implementation, least in (("kernel", 1), ("XLA", 2**30)):
      fused_attention.MIN_LENGTH = fpt_attention.FUSED_KEYS = least
      jax.clear_caches()  # traces depend on it
      gradients = jax.grad(loss, tuple(range(len(arguments))))
      cost = compile_for_core(gradients, arguments, machine)
      table.append([
        name, implementation, f"{cost.flops / 1e12:.3f}", f"{cost.memory_bytes / 1e9:.2f}",
        f"{cost.temporary_bytes / 1e6:.0f}", *map(seconds, (cost.bound.compute, cost.bound.memory)),
      ])  # fmt: skip
  print(f"{flags.topology}, one chip, bfloat16\n\n{timing.markdown(HEADER, table)}")


if __name__ == "__main__":
  main()
