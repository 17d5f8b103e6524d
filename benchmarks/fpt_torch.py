r"""The official arithmetic of FPT in PyTorch: the peer of fpt_modules.py, where PyTorch is.

  python benchmarks/fpt_torch.py --sizes=128,256,512 --width=64

Needs PyTorch and nothing of this package, so that it runs in an environment of its own. The layers
are those of `flavor="official"`, as the authors' code computes them: whole attention maps, and the
grounding transformer's map of all pairs, which ours does without. Prints a line of JSON for each
size: [side, seconds forward, seconds forward and backward, GB by which the process grew].
"""

import argparse
import itertools
import json
import resource
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

_PARTS = 2


class SelfTransformer(nn.Module):
  """A mixture of softmaxes over pooled keys, a norm, and the residual."""

  def __init__(self, width: int) -> None:
    super().__init__()
    self.query_key = nn.Conv2d(width, width, 1)
    self.value = nn.Conv2d(width, width, 1)
    self.mixture = nn.Parameter(torch.zeros(_PARTS, width))
    self.out = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns a map of the same shape."""
    batch, width, height, _ = x.shape
    pooled = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
    query, key = self.query_key(x).flatten(2), self.query_key(pooled).flatten(2)
    shares = (query.mean(2) @ self.mixture.T).softmax(1).reshape(batch * _PARTS, 1, 1)
    parts = [t.reshape(batch * _PARTS, width // _PARTS, -1) for t in (query, key)]
    weights = (torch.bmm(parts[0].transpose(1, 2), parts[1]) / width**0.5).softmax(2) * shares
    weights = weights.reshape(batch, _PARTS, *weights.shape[1:]).sum(1)
    found = torch.bmm(weights, self.value(pooled).flatten(2).transpose(1, 2))
    return self.out(found.transpose(1, 2).reshape(batch, width, height, -1)) + x


class GroundingTransformer(nn.Module):
  """Dot products of a fine map with a coarse one over the number of keys; a norm."""

  def __init__(self, width: int) -> None:
    super().__init__()
    self.query, self.key, self.value = (nn.Conv2d(width, width // 2, 1) for _ in range(3))
    self.out = nn.Sequential(nn.Conv2d(width // 2, width, 1), nn.BatchNorm2d(width))

  def forward(self, x: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
    """Returns a map of the shape of `x`."""
    query = self.query(x).flatten(2).transpose(1, 2)
    key, value = self.key(coarse).flatten(2), self.value(coarse).flatten(2).transpose(1, 2)
    found = torch.bmm(torch.bmm(query, key) / key.shape[2], value)
    return self.out(found.transpose(1, 2).reshape(len(x), -1, *x.shape[2:]))


class RenderingTransformer(nn.Module):
  """A coarse map gated by the mean of a fine one, and the fine one halved as often as needed."""

  def __init__(self, width: int) -> None:
    super().__init__()
    self.gate = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
    self.refine = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
    self.halve = nn.Conv2d(width, width, 3, 2, 1, bias=False)
    self.norm = nn.BatchNorm2d(width)

  def forward(self, x: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    """Returns a map of the shape of `x`."""
    gate = self.gate(fine.mean((2, 3), keepdim=True)).relu()
    while fine.shape[2] > x.shape[2]:
      fine = self.halve(fine)
    return (self.norm(fine) + self.refine(x) * gate).relu()


class Pyramid(nn.Module):
  """The whole transformer, without lateral convolutions; levels from fine to coarse."""

  def __init__(self, width: int, levels: int = 4) -> None:
    super().__init__()
    pairs = list(itertools.permutations(range(levels), 2))
    self.selves = nn.ModuleList(SelfTransformer(width) for _ in range(levels))
    self.others = nn.ModuleDict({
      f"{i}_{j}": (GroundingTransformer if j > i else RenderingTransformer)(width)
      for i, j in pairs
    })  # fmt: skip
    self.joins = nn.ModuleList(
      nn.Conv2d((levels + 1) * width, width, 3, 1, 1) for _ in range(levels)
    )

  def forward(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns maps of the same shapes."""
    results = []
    for i, x in enumerate(levels):
      seen = [self.others[f"{i}_{j}"](x, y) for j, y in enumerate(levels) if j != i]
      results.append(self.joins[i](torch.cat([self.selves[i](x), *seen, x], 1)))
    return results


def seconds(run: Callable[[], object], rounds: int) -> float:
  """Returns the shortest of some runs."""
  times = []
  for _ in range(rounds):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return min(times)


def measure(side: int, width: int, rounds: int) -> list[float]:
  """Returns the side, seconds forward, seconds with gradients, and GB by which the process grew."""
  torch.manual_seed(0)
  model = Pyramid(width).eval()  # as ours is measured: norms by their running statistics
  levels = [torch.randn(1, width, side // s, side // s) for s in (4, 8, 16, 32)]
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

  def forward() -> None:
    with torch.no_grad():
      model(levels)

  def backward() -> None:
    sum(x.sum() for x in model(levels)).backward()

  times = [seconds(run, rounds) for run in (forward, backward)]
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  return [side, *times, grown * 1024e-9]


def main() -> None:
  """Prints a line for each size."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--sizes", default="128,256,512")
  parser.add_argument("--width", type=int, default=64)
  parser.add_argument("--rounds", type=int, default=3)
  given = parser.parse_args()
  for side in given.sizes.split(","):
    print(json.dumps(measure(int(side), given.width, given.rounds)), flush=True)


if __name__ == "__main__":
  main()
