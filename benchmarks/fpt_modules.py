r"""The feature pyramid transformer: time and memory against the image size.

  python benchmarks/fpt_modules.py
  python benchmarks/fpt_modules.py --sizes=256,512,1024 --compile_only
  python benchmarks/fpt_modules.py --peer                      # pip install -e '.[parity]'

Square images, a pyramid of strides 4, 8, 16 and 32. "blocks" is blockwise attention, as in this
package, "whole" the same with the full attention matrix. Memory is the compiler's temporaries. With
`--peer`, the official code in PyTorch runs in a process of its own, with full matrices; its memory
is the growth of the process. Seconds are those of the fastest run.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

from vit_jax_zoo.systems.fpt.attention import BLOCK_ELEMENTS
from vit_jax_zoo.systems.fpt.transformer import TRANSFORMER_VARIANTS, FeaturePyramidTransformer

STRIDES = (4, 8, 16, 32)
HEADER = (
  "modules, image",
  "attention",
  "forward, GB",
  "gradients, GB",
  "forward, s",
  "gradients, s",
)


def pyramid(image_size: int, width: int, seed: int) -> list[Any]:
  """Returns random feature maps of an image."""
  rng = np.random.default_rng(seed)
  shapes = [(1, image_size // s, image_size // s, width) for s in STRIDES]
  return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]


def total(model: FeaturePyramidTransformer) -> Callable[..., Any]:
  """Returns the sum of all outputs as a function of variables and feature maps."""
  return lambda variables, levels: sum(jnp.sum(x) for x in model.apply(variables, levels))


def measure(variant: str, image_size: int, flags: argparse.Namespace, *, whole: bool) -> list[str]:
  """Returns the row of one variant, image size and form of attention."""
  block = 2**62 if whole else BLOCK_ELEMENTS
  model = FeaturePyramidTransformer(flags.width, variant, lateral=False, block_elements=block)
  levels = jax.eval_shape(lambda: pyramid(image_size, flags.width, 0))
  variables = jax.eval_shape(model.init, jax.random.key(0), levels)
  passes = (total(model), jax.grad(total(model)))
  compiled = [jax.jit(f).lower(variables, levels).compile() for f in passes]
  memory = [c.memory_analysis().temp_size_in_bytes / 1e9 for c in compiled]
  row = [f"{variant}, {image_size}", "whole" if whole else "blocks", *(f"{m:.3f}" for m in memory)]
  if flags.compile_only or max(memory) > flags.whole_limit_gb:
    return [*row, "-", "-"]
  variables = jax.jit(model.init)(jax.random.key(0), pyramid(image_size, flags.width, 0))
  inputs = variables, pyramid(image_size, flags.width, 1)
  runs = [timing.repeated(functools.partial(c, *inputs)) for c in compiled]
  return row + [f"{min(timing.time_rounds(run, flags.rounds)):.3f}" for run in runs]


def peer(image_size: int, flags: argparse.Namespace) -> list[str]:
  """Returns the row of the official code in PyTorch."""
  from implementations import torch_fpt

  grown, forward, gradients = timing.in_new_process(
    torch_fpt.measure, image_size, flags.width, flags.rounds
  )
  seconds = [f"{min(times):.3f}" for times in (forward, gradients)]
  return [f"official, {image_size}", "PyTorch", "-", f"{grown:.3f}", *seconds]


def main() -> None:
  """Measures all variants and sizes and prints the table."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--sizes", default="128,256,512", help="sides of the images, in pixels")
  parser.add_argument("--width", type=int, default=64, help="channels (256 in the paper)")
  parser.add_argument("--compile_only", action="store_true", help="memory only, runs nothing")
  parser.add_argument("--whole_limit_gb", type=float, default=4.0, help="do not run larger forms")
  parser.add_argument("--rounds", type=int, default=3, help="timed runs, the fastest counts")
  parser.add_argument("--peer", action="store_true", help="also the official code in PyTorch")
  flags = parser.parse_args()
  sizes = [int(size) for size in flags.sizes.split(",")]
  print(timing.machine(), flush=True)
  rows = [
    measure(variant, size, flags, whole=whole)
    for variant in TRANSFORMER_VARIANTS
    for size in sizes
    for whole in (False, True)
  ]
  rows += [peer(size, flags) for size in sizes if flags.peer]
  print(f"\n{timing.markdown(HEADER, rows)}")


if __name__ == "__main__":
  main()
