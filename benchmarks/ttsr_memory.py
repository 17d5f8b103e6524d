r"""TTSR's whole forward pass: memory and time for one image.

  python benchmarks/ttsr_memory.py
  python benchmarks/ttsr_memory.py --compile_only --sizes=270x480:1080x1920

Sizes are height x width of the low-resolution image and of the reference. Memory is XLA's analysis,
temporaries and (total) with arguments and results: with XLA's default schedule, and with the
low-memory schedule that `predict` uses. For comparison, the memory of the official algorithm's full
similarity matrix only. "resident" is the growth of the process during one run.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import timing

from vit_jax_zoo.registry import create_model
from vit_jax_zoo.systems.ttsr.predictor import compiler_options

HEADER = (
  "image:reference", "default, temp GB", "total GB", "low-memory, temp GB", "total GB",
  "full matrix, GB", "seconds", "resident, GB",
)  # fmt: skip


def input_shapes(size: str) -> list[tuple[int, ...]]:
  """Returns the shapes of the model's four images."""
  (h, w), (y, x) = ([int(side) for side in part.split("x")] for part in size.split(":"))
  return [(1, h, w, 3), (1, 4 * h, 4 * w, 3), (1, y, x, 3), (1, y, x, 3)]


def matrix_gb(size: str) -> float:
  """Returns the size of the full similarity matrix in float32."""
  (_, h, w, _), _, (_, y, x, _), _ = input_shapes(size)
  return 4e-9 * h * w * (y // 4) * (x // 4)


def measure(size: str, flags: argparse.Namespace) -> list[str]:
  """Returns the row of one size."""
  model = create_model("ttsr", dtype=flags.dtype)
  images = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in input_shapes(size)]
  variables = jax.eval_shape(model.init, jax.random.key(0), *images)

  def upscale(variables: dict, *images: jax.Array) -> jax.Array:
    return model.apply(variables, *images)["image"]

  cells, compiled = [], None
  for options in (None, compiler_options()):
    compiled = jax.jit(upscale, compiler_options=options).lower(variables, *images).compile()
    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes
    total = temporary + memory.argument_size_in_bytes + memory.output_size_in_bytes
    cells += [f"{temporary / 1e9:.2f}", f"{total / 1e9:.2f}"]
  measured = ["-", "-"] if flags.compile_only else run(compiled, variables, images)
  return [size, *cells, f"{matrix_gb(size):.1f}", *measured]


def run(
  compiled: Callable[..., jax.Array], variables: dict, images: list[jax.ShapeDtypeStruct]
) -> list[str]:
  """Returns the seconds of one run on random inputs, and the growth of the process in GB."""
  rng = np.random.default_rng(0)

  def random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    scale = np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.0
    return jnp.asarray(rng.normal(size=leaf.shape) * scale, jnp.float32)

  variables = jax.tree.map(random, variables)
  inputs = [jnp.asarray(rng.uniform(-1, 1, x.shape), jnp.float32) for x in images]
  before = timing.resident_gb()
  time = timing.time_steps(timing.repeated(lambda: compiled(variables, *inputs)), 1)
  return [f"{time.wall:.1f}", f"{timing.resident_gb() - before:.2f}"]


def main() -> None:
  """Measures all sizes and prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--sizes", default="135x240:540x960", help="HxW:HxW, separated by commas")
  parser.add_argument("--compile_only", action="store_true", help="memory only, runs nothing")
  parser.add_argument("--dtype", default="float32", help="of the network; the search is float32")
  flags = parser.parse_args()
  print(timing.machine())
  rows = [measure(size, flags) for size in flags.sizes.split(",")]
  print(f"\n{timing.markdown(HEADER, rows)}")


if __name__ == "__main__":
  main()
