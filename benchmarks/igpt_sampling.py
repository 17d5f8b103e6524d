"""Drawing pixels with the keys and values of earlier ones kept, beside recomputing the whole image.

    python benchmarks/igpt_sampling.py --model=igpt_s --pixels=32

OpenAI's sampler runs the whole model for each pixel, so a pixel costs it one forward pass. Both
ways run here, in one process, on the same weights; the kept way draws the last `--pixels` of a
32x32 image, the other one is timed for one pixel.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from vit_jax_zoo import create_model

MODEL = flags.DEFINE_string("model", "igpt_s", "one of list_models('igpt_*')")
BATCH = flags.DEFINE_integer("batch", 1, "images at once")
PIXELS = flags.DEFINE_integer("pixels", 32, "how many pixels are drawn")
DTYPE = flags.DEFINE_string("dtype", "float32", "of the computation")
REPEATS = flags.DEFINE_integer("repeats", 3, "the fastest of so many counts")


def fastest(function: Callable[[], Any], repeats: int) -> float:
  """Returns the wall seconds of the fastest call, after one that compiles."""
  jax.block_until_ready(function())
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(function())
    seconds.append(time.perf_counter() - start)
  return min(seconds)


def main(argv: list[str]) -> None:
  """Prints the table."""
  del argv
  model = create_model(MODEL.value, dtype=DTYPE.value)
  positions = model.num_positions
  init = functools.partial(model.init, method="from_tokens")
  tokens = jnp.zeros((BATCH.value, positions), jnp.int32)
  abstract = jax.eval_shape(init, jax.random.key(0), tokens)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)), abstract
  )
  whole = jax.jit(lambda v, t: model.apply(v, t, method="from_tokens")["pixel_logits"])
  complete = jax.jit(model.complete)
  given = functools.partial(jnp.full, BATCH.value)
  draw = functools.partial(complete, variables, tokens, rng=jax.random.key(0))
  recomputed = fastest(lambda: whole(variables, tokens), REPEATS.value)
  # Given all pixels, only the pass over them is left; what is more belongs to the drawn ones.
  prefill = fastest(lambda: draw(given(positions)), REPEATS.value)
  kept = fastest(lambda: draw(given(positions - PIXELS.value)), REPEATS.value)
  pixel = (kept - prefill) / PIXELS.value
  device = jax.devices()[0].device_kind
  print(f"{MODEL.value}, {BATCH.value} x {positions} pixels, {DTYPE.value}, {device}")
  print(f"{'a pixel, recomputed':<28}{1e3 * recomputed:>10.1f} ms")
  print(f"{'a pixel, kept':<28}{1e3 * pixel:>10.1f} ms")
  print(f"{'ratio':<28}{recomputed / pixel:>10.1f}")
  print(f"{'an image, kept':<28}{prefill + positions * pixel:>10.1f} s")


if __name__ == "__main__":
  app.run(main)
