"""Drawing pixels with the keys and values of earlier ones kept, beside recomputing the whole image.

    python benchmarks/igpt_sampling.py --model=igpt_s --pixels=32
    python benchmarks/igpt_sampling.py --width=128 --depth=4 --num_heads=4
    python benchmarks/igpt_sampling.py --hf                   # pip install -e '.[parity]'

OpenAI's sampler runs the whole model for each pixel, so a pixel costs it one forward pass over all
positions, wherever it lies; that pass is timed. The kept way draws the last `--pixels` of a 32x32
image; the pass over those given is timed by itself and taken off. Its buffers have the size of the
image from the start, so a pixel costs the same anywhere, and the ratio of the last pixels is that
of the mean over the image. With `--hf` transformers' `generate` draws the same pixels from the same
weights; what it keeps grows, so these last pixels are its dearest. All in one process, in turns. An
image's time is extrapolated from that of a pixel.
"""

import argparse
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

from vit_jax_zoo import create_model, export
from vit_jax_zoo.weights import Preprocess, Pretrained


def repeated(call: Callable[[], Any]) -> Callable[[int], object]:
  """Returns what makes the call so many times and waits for each."""
  return lambda count: [jax.block_until_ready(call()) for _ in range(count)]


def ways(model: Any, batch: int, pixels: int, *, hf: bool) -> dict[str, Callable[[int], object]]:
  """Returns what is timed, by name."""
  positions = model.num_positions
  init = functools.partial(model.init, method="from_tokens")
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, model.num_colors, (batch, positions), dtype=np.int32))
  variables = jax.tree.map(
    lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)),
    jax.eval_shape(init, jax.random.key(0), tokens),
  )
  whole = jax.jit(lambda v, t: model.apply(v, t, method="from_tokens")["pixel_logits"])
  draw = functools.partial(jax.jit(model.complete), variables, tokens, rng=jax.random.key(0))
  given = functools.partial(jnp.full, batch)
  runs = {
    "recomputed": repeated(lambda: whole(variables, tokens)),
    # Given all pixels, only the pass over them is left; what is more belongs to the drawn ones.
    "prefill": repeated(lambda: draw(given(positions))),
    "kept": repeated(lambda: draw(given(positions - pixels))),
  }
  return runs | (hf_ways(model, variables, tokens, pixels, whole) if hf else {})


def hf_ways(
  model: Any, variables: Any, tokens: jax.Array, pixels: int, whole: Callable[..., jax.Array]
) -> dict[str, Callable[[int], object]]:
  """Returns what transformers is timed at, on the same weights; says how far its logits are."""
  import torch  # only here: it is slow to import, and need not be installed
  from implementations import hf_imagegpt, torch_utils

  side = round(model.num_positions**0.5)
  fields = {"image_size": (side, side)}
  with tempfile.TemporaryDirectory() as folder:
    ours = Pretrained(model, variables, Preprocess((side, side)), fields, task="pixel_modelling")
    export.write(ours, "hf", folder)
    theirs: Any = hf_imagegpt.load(folder).eval()
  given = torch_utils.placed(np.array(tokens)).long()
  with torch.inference_mode():
    logits = hf_imagegpt.logits(theirs, given).float().cpu().numpy()
  away = np.abs(np.asarray(whole(variables, tokens)) - logits).max() / np.abs(logits).max()
  print(f"transformers' logits differ by {away:.0e} of the largest; {torch_utils.described()}")
  drawn = lambda count: torch_utils.repeated(lambda: hf_imagegpt.draw(theirs, given, count))  # noqa: E731
  return {"hf, one": drawn(1), "hf": drawn(pixels)}


def parse() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--model", default="igpt_s", help="one of list_models('igpt_*')")
  for field in ("width", "depth", "num_heads"):
    parser.add_argument(f"--{field}", type=int, help="in place of the model's")
  parser.add_argument("--batch", type=int, default=1, help="images at once")
  parser.add_argument("--pixels", type=int, default=32, help="how many are drawn")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--hf", action="store_true", help="beside transformers' generate, too")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--seconds", type=float, default=0.1, help="of a turn, at least one step")
  return parser.parse_args()


def main() -> None:
  """Prints the table."""
  flags = parse()
  fields = {k: getattr(flags, k) for k in ("width", "depth", "num_heads") if getattr(flags, k)}
  model = create_model(flags.model, dtype=flags.dtype, **fields)
  print(timing.machine())
  if flags.hf and flags.pixels < 2:
    sys.exit("--hf needs at least two pixels: the first comes with the pass over those given")
  runs = ways(model, flags.batch, flags.pixels, hf=flags.hf)
  times = timing.in_turns(runs, rounds=flags.rounds, seconds=flags.seconds)
  print(f"\n{table(times, flags.pixels, model.num_positions)}")
  print(
    f"\n{flags.model}{fields or ''}, {flags.batch} x {model.num_positions} pixels, {flags.dtype}; "
    f"{flags.pixels} pixels drawn; median (range) of {flags.rounds} rounds; afterwards: "
    f"{timing.machine()}"
  )


def table(times: dict[str, list[timing.Seconds]], pixels: int, positions: int) -> str:
  """Returns the costs of a pixel, and their ratios."""
  rows = []
  for what, unit in (("wall", "by the clock"), ("cpu", "CPU time")):
    seconds = {name: [getattr(t, what) for t in values] for name, values in times.items()}
    pixel = each(seconds["kept"], seconds["prefill"], pixels)
    others = {"recomputed": seconds["recomputed"]}
    if "hf" in seconds:
      others["transformers"] = each(seconds["hf"], seconds["hf, one"], pixels - 1)
    image = statistics.median(seconds["prefill"]) + positions * statistics.median(pixel)
    for name, costs in others.items():
      ratio = [a / b for a, b in zip(costs, pixel, strict=True)]
      cells = [timing.spread([1e3 * t for t in costs]) for costs in (costs, pixel)]
      rows.append([f"{name}, {unit}", *cells, timing.spread(ratio, ".1f"), f"{image:.1f}"])
  header = ("beside", "its pixel, ms", "a pixel, kept, ms", "ratio", "an image, kept, s")
  return timing.markdown(header, rows)


def each(many: list[float], few: list[float], pixels: int) -> list[float]:
  """Returns what one of the pixels costs by which two runs differ, round by round."""
  return [(a - b) / pixels for a, b in zip(many, few, strict=True)]


if __name__ == "__main__":
  main()
