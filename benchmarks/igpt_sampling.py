"""Drawing pixels with the keys and values of earlier ones kept, beside recomputing the whole image.

    python benchmarks/igpt_sampling.py --model=igpt_s --pixels=32
    python benchmarks/igpt_sampling.py --width=128 --depth=4 --num_heads=4

OpenAI's sampler runs the whole model for each pixel, so a pixel costs it one forward pass over all
positions; that pass is timed. The kept way draws the last `--pixels` of a 32x32 image, where most
is kept and a pixel costs most; the pass over those given is timed by itself and taken off. All in
one process, on the same weights, in turns. An image's time is extrapolated from that of a pixel.
Beside transformers' `generate`, which keeps keys and values too: `peers.py --pairs=igpt`.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import measuring
import numpy as np

from vit_jax_zoo import create_model


def repeated(call: Callable[[], Any]) -> Callable[[int], object]:
  """Returns what makes the call so many times and waits for each."""
  return lambda count: [jax.block_until_ready(call()) for _ in range(count)]


def ways(model: Any, batch: int, pixels: int) -> dict[str, Callable[[int], object]]:
  """Returns what is timed, by name."""
  positions = model.num_positions
  init = functools.partial(model.init, method="from_tokens")
  tokens = jnp.zeros((batch, positions), jnp.int32)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)),
    jax.eval_shape(init, jax.random.key(0), tokens),
  )
  whole = jax.jit(lambda v, t: model.apply(v, t, method="from_tokens")["pixel_logits"])
  draw = functools.partial(jax.jit(model.complete), variables, tokens, rng=jax.random.key(0))
  given = functools.partial(jnp.full, batch)
  return {
    "recomputed": repeated(lambda: whole(variables, tokens)),
    # Given all pixels, only the pass over them is left; what is more belongs to the drawn ones.
    "prefill": repeated(lambda: draw(given(positions))),
    "kept": repeated(lambda: draw(given(positions - pixels))),
  }


def parse() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--model", default="igpt_s", help="one of list_models('igpt_*')")
  for field in ("width", "depth", "num_heads"):
    parser.add_argument(f"--{field}", type=int, help="in place of the model's")
  parser.add_argument(
    "--unrolled", action="store_true", help="layers, in place of a loop over them"
  )
  parser.add_argument("--batch", type=int, default=1, help="images at once")
  parser.add_argument("--pixels", type=int, default=32, help="how many are drawn")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--seconds", type=float, default=0.1, help="of a turn, at least one step")
  return parser.parse_args()


def main() -> None:
  """Prints the table."""
  flags = parse()
  fields = {k: getattr(flags, k) for k in ("width", "depth", "num_heads") if getattr(flags, k)}
  model = create_model(flags.model, dtype=flags.dtype, **fields)
  print(measuring.machine())
  runs = ways(model, flags.batch, flags.pixels)
  times = measuring.in_turns(runs, rounds=flags.rounds, seconds=flags.seconds)
  rows = []
  for what, unit in (("wall", "by the clock"), ("cpu", "CPU time")):
    seconds = {name: [getattr(t, what) for t in values] for name, values in times.items()}
    pairs = zip(seconds["kept"], seconds["prefill"], strict=True)
    pixel = [(kept - prefill) / flags.pixels for kept, prefill in pairs]
    ratio = [a / b for a, b in zip(seconds["recomputed"], pixel, strict=True)]
    image = statistics.median(seconds["prefill"]) + model.num_positions * statistics.median(pixel)
    rows.append(
      [
        unit,
        measuring.spread([1e3 * t for t in seconds["recomputed"]]),
        measuring.spread([1e3 * t for t in pixel]),
        measuring.spread(ratio, ".1f"),
        f"{image:.1f}",
      ]
    )
  header = ("", "a pixel, recomputed, ms", "a pixel, kept, ms", "ratio", "an image, kept, s")
  print(f"\n{measuring.markdown(header, rows)}")
  print(
    f"\n{flags.model}{fields or ''}, {flags.batch} x {model.num_positions} pixels, {flags.dtype}; "
    f"{flags.pixels} pixels drawn; median (range) of {flags.rounds} rounds; afterwards: "
    f"{measuring.machine()}"
  )


if __name__ == "__main__":
  main()
