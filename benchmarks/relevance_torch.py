r"""The official form of TTSR's search in PyTorch: the peer of relevance.py, where PyTorch is.

  python benchmarks/relevance_torch.py --sizes=20x20:20x20,40x40:40x40,80x80:80x80 [--textures]

Needs PyTorch and nothing of this package, so that it runs in an environment of its own. Sizes,
inputs and rounds are those of relevance.py; so is "resident", by how much the process grew in the
run that warms up.
"""

import argparse
import os
import resource
import statistics
import time

import numpy as np
import torch
from implementations.torch_ttsr import search, transfer

_CHANNELS = (64, 128, 256)


def inputs(size: str, *, textures: bool) -> tuple[list[int], list[torch.Tensor]]:
  """Returns height and width of the picture's map, and random maps as after a ReLU."""
  rng = np.random.default_rng(0)
  (h, w), (i, j) = ([int(side) for side in part.split("x")] for part in size.split(":"))
  shapes = [(1, h, w, _CHANNELS[2]), (1, i, j, _CHANNELS[2])]
  if textures:
    shapes += [(1, i * s, j * s, c) for s, c in zip((1, 2, 4), _CHANNELS[::-1], strict=True)]
  maps = [np.maximum(rng.normal(size=s), 0).astype(np.float32) for s in shapes]
  return [h, w], [torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() for x in maps]


def resident() -> float:
  """Returns the largest resident size that the process has had, in GB (Linux: kilobytes)."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024e-9


@torch.inference_mode()
def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--sizes", default="20x20:20x20,40x40:40x40,80x80:80x80")
  parser.add_argument("--textures", action="store_true")
  parser.add_argument("--rounds", type=int, default=3)
  given = parser.parse_args()
  load = " ".join(f"{value:.1f}" for value in os.getloadavg())
  print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, load average {load}")
  print(f"{'picture:reference':24}{'resident +':>12}{'seconds':>24}")
  for name in given.sizes.split(","):
    size, (queries, references, *levels) = inputs(name, textures=given.textures)
    before, grown, seconds = resident(), 0.0, []
    for _ in range(given.rounds + 1):
      start = time.perf_counter()
      _, index = search(queries, references)
      for level, scale in zip(levels, (1, 2, 4), strict=False):
        transfer(level, index, scale, size)
      seconds.append(time.perf_counter() - start)
      grown = grown or resident() - before
    middle, low, high = (f(seconds[1:]) for f in (statistics.median, min, max))
    told = f"{middle:.3g} ({low:.3g}-{high:.3g})"
    print(f"{name:24}{grown:12.3f}{told:>24}", flush=True)


if __name__ == "__main__":
  main()
