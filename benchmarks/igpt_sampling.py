"""Image GPT's sampling with a cache, compared with recomputing and with transformers.

    python benchmarks/igpt_sampling.py --model=igpt_s --pixels=32
    python benchmarks/igpt_sampling.py --width=128 --depth=4 --num_heads=4
    python benchmarks/igpt_sampling.py --hf                   # pip install -e '.[parity]'

* recomputed: OpenAI's sampler runs the whole model for each pixel, so a pixel costs one forward
  pass over all positions; that pass is timed.
* cached: `complete` samples the last `--pixels` of an image; the pass over the prefix is timed
  separately and subtracted. The cache has the image's size from the start, so that every pixel
  costs the same.
* transformers, with `--hf`: `generate` samples the same pixels with the same weights. Its cache
  grows, so that these are its most expensive pixels.

All run alternately in one process. The time of an image is extrapolated from that of a pixel.
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
from vit_jax_zoo.systems.igpt.model import complete
from vit_jax_zoo.weights import Preprocess, Pretrained


def make_runs(model: Any, batch: int, pixels: int, *, hf: bool) -> dict[str, timing.Run]:
  """Returns the timed functions by name."""
  positions = model.num_positions
  init = functools.partial(model.init, method="from_tokens")
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, model.num_colors, (batch, positions), dtype=np.int32))
  variables = jax.tree.map(
    lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)),
    jax.eval_shape(init, jax.random.key(0), tokens),
  )
  whole = jax.jit(lambda v, t: model.apply(v, t, method="from_tokens")["pixel_logits"])
  sample = functools.partial(jax.jit(functools.partial(complete, model)), variables, tokens)
  sample = functools.partial(sample, rng=jax.random.key(0))
  given = functools.partial(jnp.full, batch)
  runs = {
    "recomputed": timing.repeated(lambda: whole(variables, tokens)),
    "prefill": timing.repeated(lambda: sample(given(positions))),  # nothing left to sample
    "cached": timing.repeated(lambda: sample(given(positions - pixels))),
  }
  return runs | (hf_runs(model, variables, tokens, pixels, whole) if hf else {})


def hf_runs(
  model: Any, variables: Any, tokens: jax.Array, pixels: int, whole: Callable[..., jax.Array]
) -> dict[str, timing.Run]:
  """Returns transformers' timed functions; prints the difference of its logits."""
  import torch  # optional dependency
  from implementations import hf_imagegpt, torch_utils

  side = round(model.num_positions**0.5)
  fields = {"image_size": (side, side)}
  with tempfile.TemporaryDirectory() as folder:
    ours = Pretrained(model, variables, Preprocess((side, side)), fields, task="pixel_modelling")
    export.write(ours, "hf", folder)
    peer: Any = hf_imagegpt.load(folder).eval()
  given = torch_utils.to_device(np.array(tokens)).long()
  with torch.inference_mode():
    logits = hf_imagegpt.logits(peer, given).float().cpu().numpy()
  difference = np.abs(np.asarray(whole(variables, tokens)) - logits).max() / np.abs(logits).max()
  print(f"transformers' logits differ by {difference:.0e}; {torch_utils.device_name()}")
  sample = functools.partial(hf_imagegpt.sample, peer, given)
  return {
    "hf, one": torch_utils.repeated(lambda: sample(1)),
    "hf": torch_utils.repeated(lambda: sample(pixels)),
  }


def parse() -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--model", default="igpt_s", help="one of list_models('igpt_*')")
  for field in ("width", "depth", "num_heads"):
    parser.add_argument(f"--{field}", type=int, help="overrides the model's")
  parser.add_argument("--batch", type=int, default=1, help="images sampled together")
  parser.add_argument("--pixels", type=int, default=32, help="pixels to sample")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--hf", action="store_true", help="also transformers' generate")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--seconds", type=float, default=0.1, help="approximate length of a turn")
  return parser.parse_args()


def main() -> None:
  """Prints the table."""
  flags = parse()
  fields = {k: getattr(flags, k) for k in ("width", "depth", "num_heads") if getattr(flags, k)}
  model = create_model(flags.model, dtype=flags.dtype, **fields)
  print(timing.machine())
  if flags.hf and flags.pixels < 2:
    sys.exit("--pixels: --hf needs at least 2; the first is sampled with the prefix")
  runs = make_runs(model, flags.batch, flags.pixels, hf=flags.hf)
  times = timing.alternate(runs, rounds=flags.rounds, seconds=flags.seconds)
  print(f"\n{table(times, flags.pixels, model.num_positions)}")
  print(
    f"\n{flags.model}{fields or ''}, {flags.batch} x {model.num_positions} pixels, {flags.dtype}; "
    f"{flags.pixels} pixels sampled; median (range) of {flags.rounds} rounds; at the end: "
    f"{timing.machine()}"
  )


def table(times: dict[str, list[timing.Seconds]], pixels: int, positions: int) -> str:
  """Returns the table of the times per pixel and their ratios."""
  rows = []
  for field, unit in (("wall", "wall time"), ("cpu", "CPU time")):
    seconds = {name: [getattr(t, field) for t in values] for name, values in times.items()}
    pixel = per_pixel(seconds["cached"], seconds["prefill"], pixels)
    peers = {"recomputed": seconds["recomputed"]}
    if "hf" in seconds:
      peers["transformers"] = per_pixel(seconds["hf"], seconds["hf, one"], pixels - 1)
    image = statistics.median(seconds["prefill"]) + positions * statistics.median(pixel)
    for name, costs in peers.items():
      ratio = [a / b for a, b in zip(costs, pixel, strict=True)]
      cells = [timing.spread([1e3 * t for t in costs]) for costs in (costs, pixel)]
      rows.append([f"{name}, {unit}", *cells, timing.spread(ratio, ".1f"), f"{image:.1f}"])
  header = ("peer", "peer, ms/pixel", "cached, ms/pixel", "ratio", "cached, s/image")
  return timing.markdown(header, rows)


def per_pixel(more: list[float], fewer: list[float], pixels: int) -> list[float]:
  """Returns the time per pixel from two runs that differ by `pixels`, round by round."""
  return [(a - b) / pixels for a, b in zip(more, fewer, strict=True)]


if __name__ == "__main__":
  main()
