r"""Time and peak memory of the whole of TTSR, enlarging one picture.

  python benchmarks/ttsr_memory.py                                   runs half of the target's size
  python benchmarks/ttsr_memory.py --compile_only --sizes=270x480:1080x1920

Sizes are height x width of the small picture and of the reference. "temp" is what the compiler sets
aside beside arguments and results, and "all" with them; on a CPU with XLA's default schedule, which
makes early what it can, and with the frugal one that `predict` asks for. "resident" is by how much
the process grew while it ran. The official algorithm's matrix of all pairs is there for comparison:
what it would take alone.
"""

import resource
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from timing import machine, markdown

from vit_jax_zoo.registry import create_model
from vit_jax_zoo.systems.ttsr.predictor import compiler_options

_SIZES = flags.DEFINE_list("sizes", ["135x240:540x960"], "Picture and reference.")
_COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Analyses memory and runs nothing.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "Of the computation; the search is float32.")


def shapes(size: str) -> list[tuple[int, ...]]:
  """Returns the shapes of the model's four pictures."""
  (h, w), (y, x) = ([int(side) for side in part.split("x")] for part in size.split(":"))
  return [(1, h, w, 3), (1, 4 * h, 4 * w, 3), (1, y, x, 3), (1, y, x, 3)]


def matrix_gigabytes(size: str) -> float:
  """Returns what the matrix of all pairs of patches would take, in float32."""
  (_, h, w, _), _, (_, y, x, _), _ = shapes(size)
  return 4e-9 * h * w * (y // 4) * (x // 4)


def measure(size: str) -> list[str]:
  """Returns one row of the table."""
  model = create_model("ttsr", dtype=_DTYPE.value)
  abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes(size)]
  variables = jax.eval_shape(model.init, jax.random.key(0), *abstract)

  def enlarge(variables: dict, *pictures: jax.Array) -> jax.Array:
    return model.apply(variables, *pictures)["image"]

  cells, compiled = [], None
  for options in (None, compiler_options()):
    compiled = jax.jit(enlarge, compiler_options=options).lower(variables, *abstract).compile()
    memory = compiled.memory_analysis()
    beside = memory.argument_size_in_bytes + memory.output_size_in_bytes
    cells += [f"{memory.temp_size_in_bytes / 1e9:.2f}"]
    cells += [f"{(memory.temp_size_in_bytes + beside) / 1e9:.2f}"]
  row = [size, *cells, f"{matrix_gigabytes(size):.1f}"]
  return row if _COMPILE_ONLY.value else [*row, *run(compiled, variables, abstract)]


def run(
  compiled: Callable[..., jax.Array], variables: dict, abstract: list[jax.ShapeDtypeStruct]
) -> list[str]:
  """Returns the seconds of one run, and by how many GB the process grew beside its inputs."""
  rng = np.random.default_rng(0)

  def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    scale = np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.0
    return jnp.asarray(rng.normal(size=leaf.shape) * scale, jnp.float32)

  variables = jax.tree.map(draw, variables)
  pictures = [jnp.asarray(rng.uniform(-1, 1, x.shape), jnp.float32) for x in abstract]
  before, start = resident(), time.perf_counter()
  jax.block_until_ready(compiled(variables, *pictures))
  return [f"{time.perf_counter() - start:.1f}", f"{resident() - before:.2f}"]


def resident() -> float:
  """Returns the largest resident size that the process has had, in GB (Linux: kilobytes)."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024e-9


def main(_: list[str]) -> None:
  """Prints the machine and the table."""
  header = ["picture:reference", "temp GB", "all GB", "frugal temp", "frugal all", "matrix GB"]
  header += [] if _COMPILE_ONLY.value else ["seconds", "resident + GB"]
  print(machine())
  print(markdown(header, [measure(size) for size in _SIZES.value]))


if __name__ == "__main__":
  app.run(main)
